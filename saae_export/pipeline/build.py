"""`saae-export build`: the whole road from a folder of good pictures to a verified bundle, in named stages.

Every stage writes whole files or none, so the command can be stopped at any moment and given again: drawn images,
features, a half-done fit and the finished model are reused, and the bundle that was there before stays until the new
one is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from saae_runtime.bundle import Bundle, refuse_foreign, write_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.files import alone
from saae_runtime.manifest import IN_BF16, Calibration
from saae_runtime.stages import Stages
from saae_train.data.category import Category, content_digest, split_held_out
from saae_train.data.check import check
from saae_train.evaluation.evaluate import Evaluation
from saae_train.model.checkpoint import read_fit_config
from saae_train.selftest.result import SelfTest

from ..artefacts import CPU, OPENVINO
from ..int8.choose import require_frames
from ..parity.compare import ParityReport
from ..parity.pytorch import TorchReference
from ..parity.reference import ReferenceFrame, write_reference
from ..report.data import LatencyRow
from ..report.html import write_report
from .bundle import named_frames, parse_frame_size
from .fit import fitted
from .graphs import calibrated, compared, compiled, default_pixel_fpr, exported, mixed, quantised
from .images import find_images, shared_size
from .measure import evaluated, self_tested, shown, timed
from .options import BuildOptions, check_options
from .report import Findings, manifest_metrics, report_data, write_heatmaps

__all__ = ["BuildOptions", "BuildResult", "build"]

_STAGES = 11


@dataclass(frozen=True)
class BuildResult:
    """What a build ended with.

    Attributes:
        bundle: written and opened.
        evaluation: on the test set; None where there are no defect images.
        self_test: on simulated defects; None where it was not asked for, or could not be made.
        parity: one report per artefact that was compared.
        latency: one row per backend and precision.
        category: the images.
        where: the bundle's folder as it was asked for.
    """

    bundle: Bundle
    evaluation: Evaluation | None
    self_test: SelfTest | None
    parity: tuple[ParityReport, ...]
    latency: tuple[LatencyRow, ...]
    category: Category
    where: Path


def build(options: BuildOptions, console: Console) -> BuildResult:
    """Builds a bundle and writes it in one piece at the end.

    Raises:
        SaaeError: of the kind that the failing stage raises; ParityError where an artefact disagrees with PyTorch,
            SelfTestError where the model misses what nobody could.
            What was done before is kept for the next run, and an earlier bundle is untouched.
        ConfigError: another build of the same product is going on in the same work folder.
        KeyboardInterrupt: Ctrl-C, likewise.
    """
    stages = Stages(console, _STAGES + options.int8)
    check_options(options)
    category, source = _find(options, stages)
    target = options.out or Path("bundles") / category.name
    refuse_foreign(target)  # before the work, not after it
    _validate(category, stages)
    if options.int8:
        fitting, _ = split_held_out(category.train, options.config.held_out, seed=options.config.seed)
        require_frames(len(fitting))
    work = options.work / category.name
    lock = options.work / f".{category.name}.lock"
    with alone(lock, f"A build of {category.name}", "wait for it, or give this one a place of its own: --work FOLDER"):
        return _built(options, category, source, target, work, stages)


def _built(
    options: BuildOptions, category: Category, source: str, target: Path, work: Path, stages: Stages
) -> BuildResult:
    """From the fit on; nobody else is in the work folder."""
    checkpoint, held_out, unseen = fitted(options, category, work, stages)
    frame_size = parse_frame_size(options.frame_size, shared_size(category.train))
    staged, graphs = work / "staged", work / "onnx"
    try:
        calibration = Calibration(len(held_out), content_digest(held_out), held_out=unseen)
        files, manifest = exported(options, checkpoint, category, calibration, frame_size, graphs, stages)
        pixel_fpr = default_pixel_fpr(options, checkpoint, category)
        bundle = calibrated(options, manifest, files, held_out, pixel_fpr, staged, stages)
        if options.int8:
            bundle = quantised(options, bundle, files["fp32"], category, held_out, pixel_fpr, work / "int8", stages)
        bundle = compiled(options, bundle, stages)
        reference = TorchReference(checkpoint.detector, (bundle.manifest.frame.height, bundle.manifest.frame.width))
        bundle, reports, not_compared = compared(options, bundle, reference, category, held_out, stages)
        evaluation = evaluated(bundle, category, stages)
        self_test, simulated = self_tested(options, bundle, category, held_out, work, stages)
        latency = timed(options, bundle, held_out, stages)
        with stages.stage("bundle and report") as stage:
            view = shown(bundle, category, evaluation, held_out)
            in_bf16 = set(IN_BF16) & set(bundle.manifest.precisions())
            findings = Findings(
                held_out_scores=view.held_out_scores,
                image_threshold=view.image_threshold,
                evaluation=evaluation,
                parity=reports,
                not_compared=not_compared,
                latency=latency,
                self_test=self_test,
                simulated=simulated,
                examples=view.examples,
                fit=checkpoint.facts,
                source=source,
                calibrated_with=CPU + (f", {OPENVINO} for what it computes in bf16" if in_bf16 else ""),
                shown_with=view.engine,
            )
            kept = named_frames(mixed(category, held_out, options.samples))
            stored = [reference.stored(name, frame) for name, frame in kept]
            final = _written(target, bundle, reports, findings, stored)
            stage.note(str(target))
    finally:
        for folder in (staged, graphs):
            shutil.rmtree(folder, ignore_errors=True)
    return BuildResult(final, evaluation, self_test, tuple(reports), tuple(latency), category, target)


def _find(options: BuildOptions, stages: Stages) -> tuple[Category, str]:
    with stages.stage("find images") as stage:
        category, source = find_images(options.request, options.work / "demo", stage)
        category = category.with_white_level(_white_level(options))
        stage.note(f"{category.name}: {len(category.train)} normal, {len(category.test)} for testing, {source}")
    if category.synthetic:
        stages.say(
            "These images are DRAWN, not photographed. Everything below shows that the road works; "
            "its numbers say nothing about a real line.",
            "bold yellow",
        )
    return category, source


def _white_level(options: BuildOptions) -> int | None:
    """White of 16-bit images: a given model's own.

    Raises:
        ConfigError: another was asked for.
        CheckpointError: there is no model, or a damaged one.
    """
    asked = options.config.white_level
    if options.checkpoint is None:
        return asked
    fitted_with = read_fit_config(options.checkpoint).white_level
    if asked is not None and asked != fitted_with:
        raise ConfigError(
            f"--white-level {asked} is not what {options.checkpoint} was fitted with ({fitted_with or 65535}).",
            "The line must see images as the model did.",
            "leave --white-level out, or fit again with it",
        )
    return fitted_with


def _validate(category: Category, stages: Stages) -> None:
    with stages.stage("check images") as stage:
        report = check(category, progress=stage)
        report.raise_if_bad()
        stage.note(f"{report.images} good" + (f", {len(report.warnings)} warnings" if report.warnings else ""))
    for warning in report.warnings[:5]:
        stages.say(f"  note: {warning}", "yellow")


def _written(
    target: Path,
    staged: Bundle,
    reports: Sequence[ParityReport],
    findings: Findings,
    stored: Sequence[ReferenceFrame],
) -> Bundle:
    """The final bundle, whole or not at all."""
    parity = {(report.artefact, report.precision): report.summary() for report in reports}
    manifest = dataclasses.replace(
        staged.manifest,
        artefacts=tuple(
            dataclasses.replace(item, parity=parity.get((item.file, item.precision)))
            for item in staged.manifest.artefacts
        ),
        metrics=manifest_metrics(findings.evaluation, findings.self_test),
    )

    def fill(folder: Path) -> None:
        for name in staged.manifest.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(staged.file(name), place)
        write_reference(folder, stored, "PyTorch FP32")
        write_heatmaps(folder / "heatmaps", findings.examples)
        write_report(folder / "report.html", report_data(manifest, findings, str(target)))

    return write_bundle(target, manifest, fill)
