"""The artefacts of a build: ONNX graphs, their thresholds, engines, and parity of every one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    CalibrationError,
    ConfigError,
    DeviceError,
    EngineIncompatibleError,
)
from saae_runtime.manifest import Calibration, Manifest, Thresholds
from saae_runtime.progress import Progress, nth
from saae_runtime.terminal import Stages
from saae_train.calibrate import Calibration as Tables
from saae_train.data.category import Category, Sample
from saae_train.data.split import spread

from ..artefacts import onnx_artefact, open_artefact
from ..parity.compare import ParityReport, parity_table, require
from ..parity.pytorch import TorchReference
from ..parity.verify import Source, compare_artefact
from ..tensorrt.compile import build_engine
from .bundle import describe, provisional_bundle, with_thresholds, without_artefact, write_graphs
from .fit import FittedModel
from .images import named_frames

__all__ = [
    "Calibrator",
    "Compared",
    "Graphs",
    "balanced_sample",
    "calibrate_bundle",
    "check_parity",
    "compile_engines",
    "export_graphs",
]

Calibrator = Callable[[Engine, Progress], Tables]
"""Returns both threshold tables of an engine."""

_AUTO_LIBRARIES = ("tensorrt", "tensorrt-rtx")
_NOT_HERE = (BackendUnavailableError, EngineIncompatibleError, DeviceError)


@dataclass(frozen=True)
class Graphs:
    """ONNX files by precision, and their manifest, still without thresholds."""

    files: Mapping[str, Path]
    manifest: Manifest


@dataclass(frozen=True)
class Compared:
    """A bundle after the parity check.

    Attributes:
        bundle: without optional artefacts that disagree.
        reports: one per artefact that was compared and kept.
        not_compared: artefact file -> why it could not be compared here.
    """

    bundle: Bundle
    reports: tuple[ParityReport, ...]
    not_compared: Mapping[str, str]


def export_graphs(
    model: FittedModel,
    folder: Path,
    precisions: Sequence[str],
    frame_size: tuple[int, int] | None,
    stages: Stages,
    *,
    calibration: Calibration,
    half_weights: bool,
    synthetic: bool,
) -> Graphs:
    """Write the graphs of the precisions; bf16, which is the FP32 file, is added if it can be calibrated."""
    with stages.stage("export ONNX") as stage:
        folder.mkdir(parents=True, exist_ok=True)
        written = [name for name in precisions if name != "bf16"]
        files = write_graphs(model.checkpoint, folder, frame_size, written, stage, half_weights)
        if "fp32" in files and not bf16_missing():
            written.append("bf16")
        manifest = describe(
            model.checkpoint,
            synthetic=synthetic,
            frame_size=frame_size,
            calibration=calibration,
            thresholds={},
        )
        stage.note(f"{', '.join(written)}, frame {manifest.frame.height} x {manifest.frame.width}")
    artefacts = tuple(onnx_artefact(name, half_weights) for name in written)
    return Graphs(files, dataclasses.replace(manifest, artefacts=artefacts))


def calibrate_bundle(
    graphs: Graphs, calibrator: Calibrator, folder: Path, asked: Collection[str], stages: Stages
) -> Bundle:
    """Write a bundle with thresholds that are calibrated on its own files.

    Args:
        graphs: from `export_graphs`.
        calibrator: returns the tables of an engine.
        folder: where to write it.
        asked: requested precisions; others are left out if they cannot run.
        stages: progress.
    """
    manifest = graphs.manifest
    with stages.stage("calibrate") as stage:
        bundle = provisional_bundle(folder, manifest, graphs.files)
        tables: dict[str, Thresholds] = {}
        for number, artefact in enumerate(manifest.artefacts):
            progress = nth(stage, number, len(manifest.artefacts))
            try:
                with open_artefact(bundle, artefact) as engine:
                    found = calibrator(engine, progress)
            except (BackendError, CalibrationError) as error:
                if artefact.precision in asked:
                    raise
                stages.say(f"  {artefact.precision} is left out: {error.what} {error.why}".rstrip(), "yellow")
                continue
            tables[artefact.precision] = Thresholds(found.pixel, found.image)
        origin = manifest.calibration
        words = "each left out" if origin.left_out else "held out" if origin.held_out else "some FITTED ON"
        stage.note(f"{origin.images} images, {words}")
        kept = tuple(item for item in manifest.artefacts if item.precision in tables)
        return with_thresholds(folder, dataclasses.replace(manifest, artefacts=kept), graphs.files, tables)


def compile_engines(bundle: Bundle, engines: Sequence[str], precision: str, stages: Stages) -> Bundle:
    """Add engines. A missing library is a note if the choice is `auto`, else an error.

    Args:
        bundle: a calibrated bundle.
        engines: `auto` (for what this machine has), `none`, or libraries.
        precision: of the graph that is compiled.
        stages: progress.
    """
    with stages.stage("engines") as stage:
        auto = "auto" in engines
        built = []
        for library in _AUTO_LIBRARIES if auto else tuple(name for name in engines if name != "none"):
            try:
                result = build_engine(bundle, library=library, precision=precision, console=None)
            except (BackendError, ConfigError) as error:  # ConfigError: a GPU that the library does not build for
                if not auto:
                    raise
                stages.say(f"  no {library} engine: {error.what} {error.why}".rstrip())
                continue
            bundle = result.bundle
            built.append(result.artefact.file)
            if auto:
                break
        stage.note(", ".join(built) or "none; the ONNX graphs run everywhere")
    return bundle


def check_parity(
    bundle: Bundle,
    reference: TorchReference,
    samples: Sequence[Sample],
    asked: Collection[str],
    cure: str,
    stages: Stages,
) -> Compared:
    """Compare every artefact that runs here with PyTorch: the parity gate.

    INT8, and bf16 that was not asked for, are removed from the bundle if they disagree or give values that are not
    finite. Anything else ends the build.

    Args:
        bundle: with all its artefacts.
        reference: the model in PyTorch.
        samples: images to compare on.
        asked: requested precisions.
        cure: what to type if the gate fails.
        stages: progress.

    Raises:
        ParityError: a requested artefact disagrees.
    """
    reports: list[ParityReport] = []
    dropped: list[ParityReport] = []
    not_compared: dict[str, str] = {}
    with stages.stage("parity") as stage:
        frames = named_frames(samples)
        source = Source(bundle.manifest, reference, lambda: frames)
        artefacts = bundle.manifest.artefacts
        for number, artefact in enumerate(artefacts):
            stage(number, len(artefacts), artefact.file)
            extra = artefact.precision not in asked and artefact.kind == "onnx"
            try:
                with open_artefact(bundle, artefact) as engine:
                    report = compare_artefact(engine, source)
            except BackendError as error:
                if extra:
                    bundle = without_artefact(bundle, artefact)
                    stages.say(f"  {artefact.precision} is left out: {error.what} {error.why}".rstrip(), "yellow")
                    continue
                if artefact.kind == "onnx" or not isinstance(error, _NOT_HERE):
                    raise  # an engine that runs here: values that are not finite are a fault
                not_compared[artefact.file] = error.what
                continue
            if extra and not report.passed:
                bundle = without_artefact(bundle, artefact)
                dropped.append(report)
            else:
                reports.append(report)
        stage.note(f"{len(frames)} images against {source.against}")
    stages.console.print(parity_table([*reports, *dropped]))
    for report in dropped:
        stages.say(f"  {report.precision} disagrees with PyTorch on these images and is left out.", "yellow")
    require(reports, cure)
    return Compared(bundle, tuple(reports), not_compared)


def balanced_sample(category: Category, held_out: Sequence[Sample], count: int) -> list[Sample]:
    """`count` images, evenly spread; half of them defective if there are defective ones."""
    defective = [sample for sample in category.test if sample.is_anomalous]
    bad = spread(defective, count // 2)
    return [*spread(held_out, count - len(bad)), *bad]
