"""The INT8 stage of a build: quantise, calibrate, gate; ship what passes and say why where nothing does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saae_runtime.bundle import Bundle, update_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError, CalibrationError, SimulationError
from saae_runtime.geometry import resize_frames
from saae_runtime.manifest import Artefact, Manifest, Thresholds
from saae_runtime.stages import Stage
from saae_train.calibrate import Calibration, calibrate
from saae_train.data.category import Category, Sample, spread

from ..artefacts import CPU, open_artefact, set_threshold
from ..int8.choose import LIMITS, Product, Quantiser
from ..int8.gate import Quality, Verdict, compare_quality, quality
from ..parity.verify import engine_scorer
from .bundle import bf16_missing, onnx_file, provisional_bundle

__all__ = ["Int8Images", "Int8Outcome", "add_int8"]

_FRAMES = 32
"""Calibration frames: ranges change little beyond."""


@dataclass(frozen=True)
class Int8Images:
    """What INT8 is made and judged with.

    Attributes:
        fitting: normal images for the ranges.
        held_out: normal images for the thresholds.
        category: its test set, or none.
        pixel_fpr, image_fpr: the default rates of the bundle.
    """

    fitting: Sequence[Sample]
    held_out: Sequence[Sample]
    category: Category
    pixel_fpr: float
    image_fpr: float


@dataclass(frozen=True)
class Int8Outcome:
    """What came of it.

    Attributes:
        shipped: precisions that are in the bundle now: none, `int8`, or `int8` and `int8-bf16`.
        lines: what was found, for a person.
    """

    shipped: tuple[str, ...]
    lines: tuple[str, ...]


def add_int8(bundle: Bundle, graph: Path, images: Int8Images, work: Path, stage: Stage) -> tuple[Bundle, Int8Outcome]:
    """Adds `int8`, and where OpenVINO has bf16 `int8-bf16`, to a calibrated bundle, if they pass the gate.

    Args:
        bundle: with its FP32 graph calibrated.
        graph: the FP32 graph.
        images: see `Int8Images`.
        work: a folder for what is tried; removed at the end.
        stage: progress.

    Raises:
        CalibrationError: too few images for ranges.
        ConfigError: nothing in the graph can be quantised.
    """
    size = (bundle.manifest.frame.height, bundle.manifest.frame.width)
    frames = [resize_frames(sample.read(), size) for sample in spread(images.fitting, _FRAMES)]
    quantiser = Quantiser(graph, frames, size, stage)
    work.mkdir(parents=True, exist_ok=True)
    try:
        return _tried(bundle, quantiser, images, work, stage)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tried(
    bundle: Bundle, quantiser: Quantiser, images: Int8Images, work: Path, stage: Stage
) -> tuple[Bundle, Int8Outcome]:
    lines: list[str] = []
    try:
        with Engine(bundle, backend=CPU, precision="fp32", verify=False, cache=False) as engine:
            reference = _measured(engine, images, stage)
    except SimulationError as error:
        lines.append(f"INT8 cannot be judged and is refused: {error.what}")
        return bundle, Int8Outcome((), tuple(lines))
    before: list[Product] = []
    for limit in LIMITS:
        products = quantiser.chosen(limit)
        if not products or products == before:
            continue
        before = products
        share = sum(product.share for product in products)
        what = f"{len(products)} of {len(quantiser.products)} products, {share:.0%} of their weights"
        file = quantiser.write(work / onnx_file("int8"), products)
        candidate = _gated("int8", bundle.manifest, file, images, reference, work, stage)
        lines.append(f"INT8 in {what}: {candidate.verdict}" + ("" if candidate.verdict.passed else ", refused"))
        if not candidate.verdict.passed:
            continue
        found = [candidate]
        if not bf16_missing():
            try:
                candidate = _gated("int8-bf16", bundle.manifest, file, images, reference, work, stage)
            except (BackendError, CalibrationError) as error:  # nobody asked for it by name
                lines.append(f"not with the rest in bf16: {error.what} {error.why}".rstrip())
            else:
                if candidate.verdict.passed:
                    found.append(candidate)
                refused = "" if candidate.verdict.passed else ", refused"
                lines.append(f"the same with the rest in bf16: {candidate.verdict}{refused}")
        left = {item.name: round(item.error, 4) for item in quantiser.products if item not in products}
        return _shipped(bundle, file, found, {"products": len(products), "left_in_fp32": left}), Int8Outcome(
            tuple(item.precision for item in found), tuple(lines)
        )
    lines.append("No INT8 graph is shipped: the bundle runs in its other precisions.")
    return bundle, Int8Outcome((), tuple(lines))


@dataclass(frozen=True)
class _Candidate:
    precision: str
    thresholds: Thresholds
    verdict: Verdict


def _gated(
    precision: str,
    manifest: Manifest,
    file: Path,
    images: Int8Images,
    reference: Quality,
    work: Path,
    stage: Stage,
) -> _Candidate:
    artefact = Artefact(onnx_file(precision), "onnx", precision)
    alone = dataclasses.replace(manifest, artefacts=(artefact,), thresholds={}, files={})
    scratch = work / "bundle"
    trial = provisional_bundle(scratch, alone, {"int8": file})
    with open_artefact(trial, artefact) as engine:
        found = _calibrated(engine, images, stage)
    thresholds = Thresholds(found.pixel, found.image)
    trial = update_bundle(trial, dataclasses.replace(trial.manifest, thresholds={precision: thresholds}), {})
    with open_artefact(trial, artefact) as engine:
        reached = _measured(engine, images, stage)
    return _Candidate(precision, thresholds, compare_quality(reference, reached))


def _calibrated(engine: Engine, images: Int8Images, stage: Stage) -> Calibration:
    return calibrate(
        engine_scorer(engine),
        images.held_out,
        images.pixel_fpr,
        images.image_fpr,
        lambda done, total: stage(done, total, "calibrating"),
    )


def _measured(engine: Engine, images: Int8Images, stage: Stage) -> Quality:
    return quality(engine, images.category, images.held_out, lambda done, total: stage(done, total, "judging quality"))


def _shipped(bundle: Bundle, file: Path, found: Sequence[_Candidate], options: dict[str, Any]) -> Bundle:
    manifest = bundle.manifest
    artefacts = tuple(
        Artefact(onnx_file(item.precision), "onnx", item.precision, options={**options, "gate": item.verdict.to_json()})
        for item in found
    )
    changed = dataclasses.replace(
        manifest,
        artefacts=(*manifest.artefacts, *artefacts),
        thresholds={**manifest.thresholds, **{item.precision: item.thresholds for item in found}},
    )
    set_threshold(file, changed.thresholds["int8"].pixel.at())
    return update_bundle(bundle, changed, {onnx_file("int8"): file})
