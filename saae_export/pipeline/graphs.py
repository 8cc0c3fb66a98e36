"""The graphs of a build: export, calibration, engines and parity of every artefact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from saae_runtime.backends.onnxruntime.openvino import bf16_missing
from saae_runtime.bundle import Bundle
from saae_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    CalibrationError,
    ConfigError,
    DeviceError,
    EngineIncompatibleError,
)
from saae_runtime.manifest import Calibration, Manifest, Thresholds
from saae_runtime.terminal import Stages
from saae_train.calibrate import calibrate, default_fpr
from saae_train.data.category import Category, Sample, spread
from saae_train.model.checkpoint import Checkpoint

from ..artefacts import open_artefact
from ..parity.compare import ParityReport, parity_table, require
from ..parity.pytorch import TorchReference
from ..parity.verify import engine_scorer
from ..tensorrt.compile import build_engine
from .bundle import (
    artefact_parity,
    describe,
    export_graphs,
    named_frames,
    onnx_artefact,
    provisional_bundle,
    with_thresholds,
    without_artefact,
)
from .int8 import Int8Images, add_int8
from .options import BuildOptions

__all__ = ["calibrated", "compared", "compiled", "default_pixel_fpr", "exported", "mixed", "quantised"]

_AUTO_LIBRARIES = ("tensorrt", "tensorrt-rtx")
_NOT_HERE = (BackendUnavailableError, EngineIncompatibleError, DeviceError)


def exported(
    options: BuildOptions,
    checkpoint: Checkpoint,
    category: Category,
    calibration: Calibration,
    frame_size: tuple[int, int] | None,
    graphs: Path,
    stages: Stages,
) -> tuple[dict[str, Path], Manifest]:
    """Graphs in the folder `graphs`, and their manifest with thresholds yet to come."""
    with stages.stage("export ONNX") as stage:
        graphs.mkdir(parents=True, exist_ok=True)
        precisions = [name for name in options.precisions if name != "bf16"]
        files = export_graphs(checkpoint, graphs, frame_size, precisions, stage, options.half_weights)
        manifest = describe(
            checkpoint,
            synthetic=category.synthetic,
            frame_size=frame_size,
            calibration=calibration,
            thresholds={},
        )
        if "fp32" in files and not bf16_missing():  # free: the same file, thresholds of its own
            precisions.append("bf16")
        stage.note(f"{', '.join(precisions)}, frame {manifest.frame.height} x {manifest.frame.width}")
    artefacts = tuple(onnx_artefact(name, options.half_weights) for name in precisions)
    return files, dataclasses.replace(manifest, artefacts=artefacts)


def default_pixel_fpr(options: BuildOptions, checkpoint: Checkpoint, category: Category) -> float:
    """The default pixel FPR: the one asked for, or the paper's for what the product is."""
    if options.pixel_fpr is not None:
        return options.pixel_fpr
    facts = checkpoint.facts if options.texture is None else {"texture": options.texture}
    return default_fpr(facts, category.name)


def calibrated(
    options: BuildOptions,
    manifest: Manifest,
    files: dict[str, Path],
    held_out: Sequence[Sample],
    pixel_fpr: float,
    staged: Path,
    stages: Stages,
) -> Bundle:
    """A bundle with thresholds that were calibrated on its very files.

    bf16 that was not asked for is left out where OpenVINO cannot run it.
    """
    with stages.stage("calibrate") as stage:
        artefacts = manifest.artefacts
        bundle = provisional_bundle(staged, manifest, files)
        tables: dict[str, Thresholds] = {}
        for number, artefact in enumerate(artefacts):
            try:
                with open_artefact(bundle, artefact) as engine:
                    found = calibrate(
                        engine_scorer(engine),
                        held_out,
                        pixel_fpr,
                        options.image_fpr,
                        lambda done, total, number=number: stage(number * total + done, len(artefacts) * total),  # type: ignore[misc]
                    )
            except (BackendError, CalibrationError) as error:
                if artefact.precision in options.precisions:
                    raise
                manifest = dataclasses.replace(
                    manifest, artefacts=tuple(a for a in manifest.artefacts if a != artefact)
                )
                stages.say(f"  {artefact.precision} is left out: {error.what} {error.why}".rstrip(), "yellow")
                continue
            tables[artefact.precision] = Thresholds(found.pixel, found.image)
        words = "held-out images" if manifest.calibration.held_out else "images, some FITTED ON"
        stage.note(f"{len(held_out)} {words}, T at pixel FPR {pixel_fpr:g}")
        return with_thresholds(staged, manifest, files, tables)


def quantised(
    options: BuildOptions,
    bundle: Bundle,
    graph: Path,
    category: Category,
    held_out: Sequence[Sample],
    pixel_fpr: float,
    work: Path,
    stages: Stages,
) -> Bundle:
    """The bundle with INT8 where it passes its gate; what was found is said either way."""
    calibrating = {sample.path for sample in held_out}
    fitting = [sample for sample in category.train if sample.path not in calibrating]
    with stages.stage("INT8") as stage:
        images = Int8Images(fitting, held_out, category, pixel_fpr, options.image_fpr)
        bundle, outcome = add_int8(bundle, graph, images, work, stage)
        stage.note(", ".join(outcome.shipped) or "refused")
    for line in outcome.lines:
        stages.say(f"  {line}", "" if outcome.shipped else "yellow")
    return bundle


def compiled(options: BuildOptions, bundle: Bundle, stages: Stages) -> Bundle:
    """Engines for what this machine has; what it has not is said, not hidden."""
    with stages.stage("engines") as stage:
        auto = "auto" in options.engines
        libraries = _AUTO_LIBRARIES if auto else tuple(name for name in options.engines if name != "none")
        precision = "fp16" if "fp16" in options.precisions else options.precisions[0]
        built = []
        for library in libraries:
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


def compared(
    options: BuildOptions,
    bundle: Bundle,
    reference: TorchReference,
    category: Category,
    held_out: Sequence[Sample],
    stages: Stages,
) -> tuple[Bundle, list[ParityReport], dict[str, str]]:
    """The gate: every artefact that runs here against PyTorch, on normal and defective images.

    bf16 that was not asked for, and INT8, leave the bundle where they disagree or give no finite values; anything else
    ends the build.
    """
    reports: list[ParityReport] = []
    dropped: list[ParityReport] = []
    not_compared: dict[str, str] = {}
    with stages.stage("parity") as stage:
        frames = named_frames(mixed(category, held_out, options.parity_images))
        artefacts = bundle.manifest.artefacts
        for number, artefact in enumerate(artefacts):
            stage(number, len(artefacts), artefact.file)
            extra = artefact.precision not in options.precisions and artefact.kind == "onnx"
            try:
                report = artefact_parity(bundle, artefact, reference, frames)
                if extra and not report.passed:
                    bundle = without_artefact(bundle, artefact)
                    dropped.append(report)
                else:
                    reports.append(report)
            except BackendError as error:
                if extra:
                    bundle = without_artefact(bundle, artefact)
                    stages.say(f"  {artefact.precision} is left out: {error.what} {error.why}".rstrip(), "yellow")
                    continue
                if artefact.kind == "onnx" or not isinstance(error, _NOT_HERE):
                    raise  # of an engine that runs here: values that are not finite are a fault like any other
                not_compared[artefact.file] = error.what
        stage.note(f"{len(frames)} images against PyTorch FP32")
    stages.console.print(parity_table([*reports, *dropped]))
    for report in dropped:
        stages.say(f"  {report.precision} disagrees with PyTorch on these images and is left out.", "yellow")
    require(reports, f"the model is kept in {options.work / category.name}; try --precision fp32")
    return bundle, reports, not_compared


def mixed(category: Category, held_out: Sequence[Sample], count: int) -> list[Sample]:
    """Half normal, half defective images where there are both, evenly spread."""
    defective = [sample for sample in category.test if sample.is_anomalous]
    bad = spread(defective, count // 2)
    return [*spread(held_out, count - len(bad)), *bad]
