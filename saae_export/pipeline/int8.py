"""The INT8 stage of a build: quantises, calibrates, checks quality; adds what passes, or says why nothing does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.bundle import Bundle, update_bundle
from saae_runtime.errors import BackendError, CalibrationError, SimulationError
from saae_runtime.geometry import resize_frames
from saae_runtime.manifest import Thresholds
from saae_runtime.progress import labelled
from saae_runtime.terminal import Stage, Stages
from saae_train.data.split import Split, spread

from ..artefacts import onnx_artefact, onnx_file, open_artefact, set_threshold
from ..int8.choose import LIMITS, Product, Quantiser
from .bundle import provisional_bundle
from .graphs import Calibrator
from .quality import Quality, Verdict, compare_quality
from .verdicts import Judge

__all__ = ["Int8Images", "add_int8"]

_FRAMES = 32
"""Number of calibration frames; more change the ranges little."""


@dataclass(frozen=True)
class Int8Images:
    """The images that INT8 is made from and judged on.

    Attributes:
        split: images to take ranges from.
        judge: measures quality.
        calibrator: returns the thresholds.
    """

    split: Split
    judge: Judge
    calibrator: Calibrator


def add_int8(bundle: Bundle, graph: Path, images: Int8Images, work: Path, stages: Stages) -> Bundle:
    """Add `int8`, and `int8-bf16` if OpenVINO has bf16 here, to a calibrated bundle, if they pass the gate.

    Args:
        bundle: with its FP32 graph calibrated.
        graph: the FP32 graph.
        images: see `Int8Images`.
        work: a folder for attempts; removed at the end.
        stages: progress, and remarks.

    Raises:
        CalibrationError: too few images for ranges.
        ConfigError: nothing in the graph can be quantised.
    """
    lines: list[str] = []
    with stages.stage("INT8") as stage:
        size = (bundle.manifest.frame.height, bundle.manifest.frame.width)
        frames = [resize_frames(sample.read(), size) for sample in spread(images.split.fitting, _FRAMES)]
        quantiser = Quantiser(graph, frames, size, stage)
        work.mkdir(parents=True, exist_ok=True)
        try:
            found = _Trials(bundle, quantiser, images, work, stage, lines).run()
            if found is not None:
                bundle = _ship(bundle, found)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        stage.note(", ".join(item.precision for item in found.candidates) if found else "refused")
    for line in lines:
        stages.say(f"  {line}", "" if found else "yellow")
    return bundle


@dataclass(frozen=True)
class _Candidate:
    precision: str
    thresholds: Thresholds
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.verdict}" + ("" if self.verdict.passed else ", refused")


@dataclass(frozen=True)
class _Passed:
    """A quantised graph, the precisions in which it passed the gate, and its options for the manifest."""

    file: Path
    candidates: Sequence[_Candidate]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Trials:
    """Tries quantised graphs, from most to least INT8, against FP32; `lines` collects remarks for the user."""

    bundle: Bundle
    quantiser: Quantiser
    images: Int8Images
    work: Path
    stage: Stage
    lines: list[str]

    def run(self) -> _Passed | None:
        """The first graph that passes; None if none does."""
        try:
            reference = self.images.judge.reference(self.bundle, self.stage)
        except SimulationError as error:
            self.lines.append(f"INT8 cannot be judged and is refused: {error.what}")
            return None
        before: list[Product] = []
        every = self.quantiser.products
        for limit in LIMITS:
            products = self.quantiser.chosen(limit)
            if not products or products == before:
                continue
            before = products
            file = self.quantiser.write(self.work / onnx_file("int8"), products)
            candidate = self._try("int8", file, reference)
            share = sum(product.share for product in products)
            self.lines.append(
                f"INT8 in {len(products)} of {len(every)} products, {share:.0%} of their weights: {candidate}"
            )
            if candidate.verdict.passed:
                left = {item.name: round(item.error, 4) for item in every if item not in products}
                options = {"products": len(products), "left_in_fp32": left}
                return _Passed(file, [candidate, *self._try_bf16(file, reference)], options)
        self.lines.append("No INT8 graph is shipped: the bundle runs in its other precisions.")
        return None

    def _try_bf16(self, file: Path, reference: Quality) -> list[_Candidate]:
        """The same graph with the rest in bf16, if that runs here and passes."""
        if bf16_missing():
            return []
        try:
            candidate = self._try("int8-bf16", file, reference)
        except (BackendError, CalibrationError) as error:
            self.lines.append(f"not with the rest in bf16: {error.what} {error.why}".rstrip())
            return []
        self.lines.append(f"the same with the rest in bf16: {candidate}")
        return [candidate] if candidate.verdict.passed else []

    def _try(self, precision: str, file: Path, reference: Quality) -> _Candidate:
        artefact = onnx_artefact(precision)
        alone = dataclasses.replace(self.bundle.manifest, artefacts=(artefact,), thresholds={}, files={})
        trial = provisional_bundle(self.work / "bundle", alone, {"int8": file})
        with open_artefact(trial, artefact) as engine:
            tables = self.images.calibrator(engine, labelled(self.stage, "calibrating"))
        thresholds = Thresholds(tables.pixel, tables.image)
        trial = update_bundle(trial, dataclasses.replace(trial.manifest, thresholds={precision: thresholds}), {})
        with open_artefact(trial, artefact) as engine:
            found = self.images.judge.quality(engine, self.stage)
        return _Candidate(precision, thresholds, compare_quality(reference, found))


def _ship(bundle: Bundle, passed: _Passed) -> Bundle:
    """The bundle with the graph and its thresholds."""
    manifest = bundle.manifest
    artefacts = tuple(
        dataclasses.replace(onnx_artefact(item.precision), options={**passed.options, "gate": item.verdict.to_json()})
        for item in passed.candidates
    )
    thresholds = {item.precision: item.thresholds for item in passed.candidates}
    changed = dataclasses.replace(
        manifest,
        artefacts=(*manifest.artefacts, *artefacts),
        thresholds={**manifest.thresholds, **thresholds},
    )
    set_threshold(passed.file, thresholds["int8"].pixel.at())
    return update_bundle(bundle, changed, {onnx_file("int8"): passed.file})
