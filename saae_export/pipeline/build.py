"""`saae-export build`: from a folder of good images to a verified bundle, in named stages.

Every stage writes complete files or none, so the command can be stopped at any time and run again. Drawn images,
features, an unfinished fit and the fitted model are reused, and an earlier bundle stays until the new one is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.bundle import Bundle, refuse_foreign, write_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.locks import alone
from saae_runtime.manifest import IN_BF16, Calibration, Manifest
from saae_runtime.reference import ReferenceFrame, write_reference
from saae_runtime.shell import shell_line
from saae_runtime.terminal import Stages
from saae_train.calibrate import OBJECT_FPR, calibrate, default_fpr
from saae_train.data.category import Category
from saae_train.data.check import check
from saae_train.data.split import content_digest
from saae_train.evaluation.result import Evaluation
from saae_train.model.checkpoint import read_fit_config
from saae_train.selftest.choose import Choice
from saae_train.selftest.result import SelfTest

from ..artefacts import CPU, OPENVINO
from ..fitted import write_fitted
from ..parity.compare import ParityReport
from ..parity.pytorch import TorchReference
from ..report.data import LatencyRow, Report
from ..report.html import write_report
from .fit import FittedModel, fit_model, refuse_fitted
from .graphs import Calibrator, balanced_sample, calibrate_bundle, check_parity, compile_engines, export_graphs
from .images import find_images, is_named, named_frames, samples_named, shared_size, without_excluded
from .int8 import Int8Images, add_int8
from .left_out import LeftOutCalibrator, Outlier
from .measure import (
    choose_backend,
    keep_speeds,
    measure_detection,
    measure_latency,
    measure_quality,
    say_verdicts,
)
from .options import BuildOptions, check_options, parse_frame_size
from .report import add_examples, add_left_out, manifest_metrics, write_heatmaps
from .select import possible_configs, select_config, try_configs
from .verdicts import Judge, keep_verdicts

__all__ = ["BuildOptions", "BuildResult", "build"]

_STAGES = 12


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        bundle: the written bundle, opened.
        evaluation: on the test set; None where there are no test images.
        self_test: on simulated defects; None if it was not asked for, or not possible.
        parity: one report per artefact that was compared.
        latency: one row per backend and precision.
        category: the images.
        where: the bundle's folder as it was given.
    """

    bundle: Bundle
    evaluation: Evaluation | None
    self_test: SelfTest | None
    parity: tuple[ParityReport, ...]
    latency: tuple[LatencyRow, ...]
    category: Category
    where: Path


def build(options: BuildOptions, console: Console) -> BuildResult:
    """Build a bundle and write it in one piece at the end.

    Raises:
        SaaeError: of the kind that the failing stage raises; ParityError if an artefact disagrees with PyTorch,
            SelfTestError if the model misses large, strong simulated defects. The results of earlier stages are kept
            for the next run, and an earlier bundle is untouched.
        ConfigError: another build of the same product runs in the same work folder.
        KeyboardInterrupt: Ctrl-C, likewise.
    """
    check_options(options)
    configs, left_out = possible_configs(options.config, options.select, options.self_test_frames)
    stages = Stages(console, _STAGES + options.int8 + _has_bf16(options.precisions) + 2 * len(configs))
    for name, why in left_out.items():
        stages.say(f"  --select leaves out {name}: {why}", "yellow")
    category, source = _find_category(options, stages)
    target = options.out or Path("bundles") / category.name
    refuse_foreign(target)  # fail before the work
    _check_images(category, stages)
    work = options.work / category.name
    lock = options.work / f".{category.name}.lock"
    with alone(lock, f"A build of {category.name}", "wait for it, or give this one another work folder: --work FOLDER"):
        choice = None
        if configs:
            trials = try_configs(
                options.fit, configs, options.frame_size, options.self_test_frames, category, work, stages
            )
            config, choice = select_config(configs, trials, stages)
            options = dataclasses.replace(options, config=config)
        model = fit_model(options.fit, category, work, stages)
        try:
            return _build_bundle(options, category, source, model, choice, target, work, stages)
        finally:
            for folder in ("staged", "onnx"):
                shutil.rmtree(work / folder, ignore_errors=True)


def _build_bundle(
    options: BuildOptions,
    category: Category,
    source: str,
    model: FittedModel,
    choice: Choice | None,
    target: Path,
    work: Path,
    stages: Stages,
) -> BuildResult:
    """Run all stages from the export on. The work folder is locked."""
    split, asked = model.split, options.precisions
    frame_size = parse_frame_size(options.frame_size, shared_size(category.train))
    detector = model.checkpoint.detector
    reference = TorchReference(detector, frame_size or detector.backbone.input_size)
    calibrator, origin, outliers = _calibration(options, model, category, reference)
    graphs = export_graphs(
        model,
        work / "onnx",
        asked,
        frame_size,
        stages,
        calibration=origin,
        half_weights=options.half_weights,
        synthetic=category.synthetic,
    )
    bundle = calibrate_bundle(graphs, calibrator, work / "staged", asked, stages)
    _say_outliers(outliers, options, stages)
    judge = Judge(category, split.normal)
    if options.int8:
        bundle = add_int8(bundle, graphs.files["fp32"], Int8Images(split, judge, calibrator), work / "int8", stages)
    bundle = compile_engines(bundle, options.engines, "fp16" if "fp16" in asked else asked[0], stages)
    images = balanced_sample(category, split.normal, options.parity_images)
    cure = f"the model is kept in {work}; try --precision fp32"
    compared = check_parity(bundle, reference, images, asked, cure, stages)
    bundle = keep_verdicts(compared.bundle, judge, asked, stages) if _has_bf16(asked) else compared.bundle
    choose_backend(bundle, options.measure_latency, stages)
    evaluation = measure_quality(bundle, judge, stages)
    if evaluation is not None:
        say_verdicts(evaluation, bundle.manifest.thresholds[asked[0]].image, stages)
    self_test, simulated = measure_detection(
        bundle,
        split.normal,
        options.self_test_frames if options.self_test else 0,
        None if options.allow_blind else _blind_cure(options, model, category, work),
        evaluation,
        stages,
        synthetic=category.synthetic,
    )
    latency = measure_latency(bundle, split.normal, options.measure_latency, stages)
    with stages.stage("bundle and report") as stage:
        in_bf16 = set(IN_BF16) & set(bundle.manifest.precisions())
        report = Report(
            manifest=_final_manifest(bundle.manifest, compared.reports, evaluation, self_test, choice),
            bundle=str(target),
            source=source,
            record=model.checkpoint.record,
            evaluation=evaluation,
            self_test=self_test,
            not_compared=compared.not_compared,
            latency=latency,
            simulated=simulated,
            calibrated_with=CPU + (f", {OPENVINO} for what it computes in bf16" if in_bf16 else ""),
        )
        if isinstance(calibrator, LeftOutCalibrator):
            report = add_left_out(report, calibrator, bundle, category, outliers)
        else:
            report = add_examples(report, bundle, category, split.normal)
        kept = named_frames(balanced_sample(category, split.normal, options.samples))
        in_memory = model.checkpoint.record.fitted_on if model.checkpoint.left_out is not None else None
        stored = [reference.stored(name, frame) for name, frame in kept]
        final = _write_final(target, bundle, report, stored, in_memory)
        stage.note(str(target))
    keep_speeds(final, options.measure_latency)
    return BuildResult(final, evaluation, self_test, compared.reports, tuple(latency), category, target)


def _has_bf16(precisions: Collection[str]) -> bool:
    """Whether a bundle of these precisions can have bf16, which is the FP32 graph in OpenVINO."""
    return "fp32" in precisions and not bf16_missing()


def _calibration(
    options: BuildOptions, model: FittedModel, category: Category, reference: TorchReference
) -> tuple[Calibrator, Calibration, list[Outlier]]:
    """The calibrator, the origin of the thresholds for the manifest, and the images to look at.

    With a memory each fitted image is scored with itself left out; without one the thresholds are the paper's
    quantiles of held-out images (section 4.1.2).
    """
    checkpoint, split = model.checkpoint, model.split
    if checkpoint.left_out is None:
        held_out = split.held_out
        pixel, image = _pixel_fpr(options, model, category), options.image_fpr or 0.0
        origin = Calibration(len(held_out), content_digest(held_out), held_out=split.unseen)
        return lambda engine, progress: calibrate(engine, held_out, pixel, image, progress), origin, []
    calibrator = LeftOutCalibrator(
        checkpoint,
        split.fitting,
        reference,
        _pixel_fpr(options, model, category),
        DEFAULT_FALSE_ALARMS if options.image_fpr is None else options.image_fpr,
    )
    outliers = calibrator.outliers()
    origin = Calibration(
        len(checkpoint.left_out.names),
        checkpoint.record.digest or content_digest(split.fitting),
        held_out=False,
        left_out=True,
        near_copies=checkpoint.left_out.reach,
        outliers=tuple(item.name for item in outliers),
    )
    return calibrator, origin, outliers


def _pixel_fpr(options: BuildOptions, model: FittedModel, category: Category) -> float:
    """The default pixel FPR: the requested one; 0.001 with a memory; else the paper's for textures or objects."""
    if options.pixel_fpr is not None:
        return options.pixel_fpr
    if model.checkpoint.left_out is not None:
        return OBJECT_FPR
    texture = model.checkpoint.record.texture if options.texture is None else options.texture
    return default_fpr(texture, category.name)


def _say_outliers(outliers: Sequence[Outlier], options: BuildOptions, stages: Stages) -> None:
    """Name the images that the user should look at, because what they show is taken for normal."""
    new = [item for item in outliers if not any(is_named(item.name, pattern) for pattern in options.keep)]
    if not new:
        return
    listed = ", ".join(f"{item.name} ({item.score:.2f} T)" for item in new[:5])
    more = f" and {len(new) - 5} more" if len(new) > 5 else ""
    how = "" if options.checkpoint is None else ", and fit again, without --checkpoint"
    stages.say(
        f"  look at {listed}{more}: unlike the others, or decisive for the threshold alone. A scratch, glare, another "
        f"product? Leave out what is not good: {shell_line('--exclude', new[0].name)}{how}; "
        f"keep what is: {shell_line('--keep', new[0].name)}",
        "yellow",
    )


def _blind_cure(options: BuildOptions, model: FittedModel, category: Category, work: Path) -> str:
    """What to type if the model is blind: how to see its misses, and how to build anyway."""
    images = [word for folder in options.request.normal for word in ("--normal", folder)]
    images = images or ["--data", category.root.parent]
    words = ["saae-train", "selftest", model.folder, *images, "--category", category.name]
    command = shell_line(*words, "--out", work / "misses")
    return (
        f"give more or clearer images, or fit longer (--steps); `{command}` shows what the model misses; "
        "--allow-blind builds it anyway"
    )


def _find_category(options: BuildOptions, stages: Stages) -> tuple[Category, str]:
    with stages.stage("find images") as stage:
        category, source = find_images(options.request, options.work / "demo", stage)
        left = without_excluded(category, options.exclude)
        samples_named(left.train, options.keep, "--keep")
        if options.checkpoint is not None:
            refuse_fitted(options.checkpoint, sorted(set(category.train) - set(left.train), key=lambda s: s.path))
        category = left.with_white_level(_white_level(options))
        stage.note(f"{category.name}: {len(category.train)} normal, {len(category.test)} for testing, {source}")
    if category.synthetic:
        stages.say(
            "These images are DRAWN, not photographed. Everything below shows that the build works; "
            "its numbers say nothing about a real line.",
            "bold yellow",
        )
    return category, source


def _white_level(options: BuildOptions) -> int | None:
    """The white level of 16-bit images; with a given model, the model's.

    Raises:
        ConfigError: it is not the level of the given model.
        CheckpointError: there is no model, or a damaged one.
    """
    asked = options.config.white_level
    if options.checkpoint is None:
        return asked
    fitted_with = read_fit_config(options.checkpoint).white_level
    if asked is not None and asked != fitted_with:
        raise ConfigError(
            f"--white-level {asked} is not what {options.checkpoint} was fitted with ({fitted_with or 65535}).",
            "The line must read images as the model did.",
            "leave --white-level out, or fit again with it",
        )
    return fitted_with


def _check_images(category: Category, stages: Stages) -> None:
    with stages.stage("check images") as stage:
        report = check(category, progress=stage)
        report.raise_if_bad()
        stage.note(f"{report.images} good" + (f", {len(report.warnings)} warnings" if report.warnings else ""))
    for warning in report.warnings[:5]:
        stages.say(f"  note: {warning}", "yellow")


def _final_manifest(
    manifest: Manifest,
    reports: Sequence[ParityReport],
    evaluation: Evaluation | None,
    self_test: SelfTest | None,
    choice: Choice | None,
) -> Manifest:
    """The manifest with parity and metrics."""
    parity = {(report.artefact, report.precision): report.summary() for report in reports}
    artefacts = tuple(
        dataclasses.replace(item, parity=parity.get((item.file, item.precision))) for item in manifest.artefacts
    )
    metrics = manifest_metrics(evaluation, self_test)
    if choice is not None:
        metrics["select"] = choice.to_json()
    return dataclasses.replace(manifest, artefacts=artefacts, metrics=metrics)


def _write_final(
    target: Path, staged: Bundle, report: Report, stored: Sequence[ReferenceFrame], in_memory: Sequence[str] | None
) -> Bundle:
    """Write the final bundle, all or nothing."""

    def fill(folder: Path) -> None:
        for name in staged.manifest.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(staged.file(name), place)
        write_reference(folder, stored, "PyTorch FP32")
        if in_memory:
            write_fitted(folder, in_memory)
        write_heatmaps(folder / "heatmaps", report.examples)
        write_report(folder / "report.html", report)

    return write_bundle(target, report.manifest, fill)
