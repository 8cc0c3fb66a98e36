"""New thresholds for a finished bundle, from new images of good parts; without PyTorch and onnx.

When a lamp ages or a camera is changed, the scores of good parts move, and the thresholds have to follow. The bundle's
own artefacts score the new images, each precision in its own arithmetic, as in the build.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from saae_runtime.bundle import Bundle, open_bundle, refuse_foreign, update_bundle
from saae_runtime.errors import BackendError, BackendUnavailableError, ConfigError
from saae_runtime.files import sha256_bytes
from saae_runtime.manifest import IN_BF16, Artefact, Calibration, Manifest, Thresholds
from saae_runtime.reference import read_reference
from saae_runtime.result import Scored
from saae_runtime.terminal import Stage, Stages
from saae_train.calibrate import calibrate, check_default_rate
from saae_train.data.category import Sample
from saae_train.data.split import content_digest

from ..artefacts import open_artefact, with_threshold
from ..fitted import read_fitted
from ..parity.compare import ParityReport, require
from ..parity.verify import compare_artefact, stored_source
from .images import about_images, check_images, without_fitted

__all__ = ["REPORT", "Change", "Recalibration", "recalibrate"]

REPORT = "report.html"

_AT_T = ("pixel_fpr", "pixel_fpr_good", "pixel_fpr_halo", "pixel_tpr", "image_fpr", "image_tpr", "self_test")
"""Metrics of a manifest that were counted at the thresholds of the build."""

_BANNER = (
    '\n<div class="banner warn" id="recalibrated">\n  <strong>These thresholds are out of date</strong>\n'
    "  <p>The bundle was calibrated again on images given later (saae-export calibrate). This report and the\n"
    "  heatmaps are those of the build; saae-export inspect shows the thresholds in force.</p>\n</div>"
)
_HEADER_ENDS = "</header>"


@dataclass(frozen=True)
class Change:
    """The old and new thresholds of one precision.

    Attributes:
        precision: one of `saae_runtime.manifest.PRECISIONS`.
        backend: library, device, arithmetic and file that the images were scored with.
        before, after: the threshold tables, pixel and image.
        scores: image scores of the images, in their order.
        marked_before: share of the images' pixels above the pixel T before, 0..1.
    """

    precision: str
    backend: str
    before: Thresholds
    after: Thresholds
    scores: tuple[float, ...]
    marked_before: float

    @property
    def rejected_before(self) -> int:
        """How many of the images the old image threshold calls defective."""
        return self._rejected(self.before)

    @property
    def rejected_after(self) -> int:
        """How many of them the new image threshold calls defective."""
        return self._rejected(self.after)

    def _rejected(self, thresholds: Thresholds) -> int:
        limit = thresholds.image.at()
        return sum(score > limit for score in self.scores)


@dataclass(frozen=True)
class Recalibration:
    """The result of `recalibrate`.

    Attributes:
        bundle: the written bundle with the new thresholds; with `dry_run` the opened one.
        changes: one for each precision, in the order of the manifest.
        dropped: descriptions of the precisions that were removed from the bundle, with their files.
        parity: comparisons with the bundle's reference frames at the new T.
        samples: the images.
        notes: remarks for the user on the images and the rates.
    """

    bundle: Bundle
    changes: tuple[Change, ...]
    dropped: tuple[str, ...]
    parity: tuple[ParityReport, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def recalibrate(
    bundle: str | os.PathLike[str],
    samples: Sequence[Sample],
    *,
    precisions: Sequence[str] | None = None,
    pixel_fpr: float | None = None,
    image_fpr: float | None = None,
    target: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> Recalibration:
    """Compute both threshold tables of each precision again and write them into the bundle, all or nothing.

    All thresholds of a bundle come from the same images. So a precision that is not calibrated is removed: with its old
    thresholds it would decide wrongly on another machine, without a warning.

    What depends on T is updated: the graphs' default thresholds, and parity. Artefacts that run here are compared again
    with the bundle's reference frames; the others count as not compared until `verify` runs. Metrics at the old T are
    removed from the manifest, and the report gets a note.

    Args:
        bundle: the folder.
        samples: normal images of any size, from `saae_export.calibrate.images.find_images`. Those that the bundle's
            memory was made from are not used.
        precisions: which to calibrate; None for all that the bundle has.
        pixel_fpr: default acceptable share of normal pixels above T; None keeps the bundle's.
        image_fpr: default acceptable share of normal images called defective; None keeps the bundle's.
        target: folder of the new bundle; None replaces this one.
        dry_run: write nothing.
        console: where progress is shown; None shows none.

    Raises:
        BundleError: no bundle there, or a damaged one.
        ConfigError: a precision that the bundle lacks, a rate outside 0..1, or a `target` that is not a bundle.
        DataError: too few images, or unusable ones, which are listed.
        BackendUnavailableError: precisions that cannot run here, which are listed with the reasons.
        CalibrationError: a score that is not finite.
        ParityError: at the new T an artefact decides differently from its reference. Nothing is written.
        StorageError: the disk is full, or the place may not be written to.
    """
    opened = open_bundle(bundle)
    if not dry_run:
        refuse_foreign(opened.path if target is None else Path(target))  # fail before the work
    white_level = opened.manifest.frame.white_level
    samples = [dataclasses.replace(sample, white_level=white_level) for sample in samples]
    samples, in_memory = without_fitted(samples, read_fitted(opened))
    chosen = _chosen(opened, precisions)
    check_default_rate(pixel_fpr, "--pixel-fpr")
    check_default_rate(image_fpr, "--image-fpr")
    stages = Stages(console or Console(quiet=True), len(chosen) + 3 + (not dry_run))
    with stages.stage("check images") as stage:
        notes = in_memory + check_images(opened.manifest.category, samples, stage)
        stage.note(f"{len(samples)} images")
    with stages.stage("open artefacts") as stage:
        runners = _runners(opened, chosen, stage)
        stage.note(", ".join(chosen))
    changes = [
        _calibrated(opened, runners[name], samples, pixel_fpr, image_fpr, stages)
        for name in opened.manifest.precisions()
        if name in runners
    ]
    calibration = Calibration(len(samples), content_digest(samples), held_out=None, given_later=True)
    manifest, dropped, files = _changed(opened, {item.precision: item.after for item in changes}, calibration)
    with stages.stage("parity at the new T") as stage:
        manifest, reports = _compared(opened, manifest, stage)
        stage.note(f"{len(reports)} of {len(manifest.artefacts)} artefacts compared")
    if not dry_run:
        with stages.stage("write") as stage:
            opened = _written(opened, manifest, files, target)
            stage.note(str(opened.path))
    notes += about_images(samples, changes[0].scores, changes[0].after.image)
    return Recalibration(opened, tuple(changes), dropped, reports, tuple(samples), notes)


def _chosen(bundle: Bundle, precisions: Sequence[str] | None) -> tuple[str, ...]:
    have = bundle.manifest.precisions()
    if precisions is None:
        return have
    unknown = [name for name in precisions if name not in have]
    if unknown or not precisions:
        raise ConfigError(
            f"{bundle.path} has no precision {', '.join(unknown) or 'of that name'}.",
            f"It has: {', '.join(have) or 'none'}.",
            f"--precision {','.join(have)}, or leave it out for all of them",
        )
    return tuple(name for name in have if name in precisions)


def _runners(bundle: Bundle, precisions: Sequence[str], stage: Stage) -> dict[str, Artefact]:
    """The artefact that each precision is calibrated with. Opens each of them once."""
    found: dict[str, Artefact] = {}
    reasons: dict[str, list[str]] = {}
    for number, precision in enumerate(precisions):
        stage(number, len(precisions), precision)
        why = ""
        # The graph first, as the build does; engines of the same precision share its thresholds.
        for artefact in sorted(bundle.artefacts(precision=precision), key=lambda item: item.kind != "onnx"):
            if artefact.parity is not None and not artefact.parity.passed:
                why = why or f"{artefact.file} failed its parity check"
                continue
            try:
                open_artefact(bundle, artefact).close()
            except BackendError as error:
                why = why or (error.why or error.what).rstrip(".")
                continue
            found[precision] = artefact
            break
        else:
            reasons.setdefault(why, []).append(precision)
    if not reasons:
        return found
    if found:
        cure = f"install what is missing, or --precision {','.join(found)}: then the others are removed from the bundle"
    else:
        cure = "pip install 'saae[cpu]'; saae-export doctor shows what this machine can run"
    raise BackendUnavailableError(
        f"Not every precision of {bundle.path} can be calibrated on this machine.",
        "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()),
        cure,
    )


def _calibrated(
    bundle: Bundle,
    artefact: Artefact,
    samples: Sequence[Sample],
    pixel_fpr: float | None,
    image_fpr: float | None,
    stages: Stages,
) -> Change:
    before = bundle.manifest.thresholds[artefact.precision]
    limit = np.float32(before.pixel.at())
    above = pixels = 0

    with stages.stage(f"calibrate {artefact.precision}") as stage, open_artefact(bundle, artefact) as engine:

        def score(frame: NDArray[np.uint8]) -> Scored:
            nonlocal above, pixels
            result: Scored = engine(frame)
            above += int(np.count_nonzero(result.anomaly_map > limit))
            pixels += result.anomaly_map.size
            return result

        found = calibrate(
            score,
            samples,
            before.pixel.default_fpr if pixel_fpr is None else pixel_fpr,
            before.image.default_fpr if image_fpr is None else image_fpr,
            stage,
            estimate=before.image.rule == "log-normal",
        )
        stage.note(engine.backend.description)
        backend = engine.backend.description
    after = Thresholds(found.pixel, found.image)
    return Change(artefact.precision, backend, before, after, found.scores, above / pixels)


def _changed(
    bundle: Bundle, thresholds: Mapping[str, Thresholds], calibration: Calibration
) -> tuple[Manifest, tuple[str, ...], dict[str, Callable[[], bytes]]]:
    """The manifest, descriptions of what is removed, and the changed files: name -> new bytes."""
    before = bundle.manifest
    kept = [item for item in before.artefacts if item.precision in thresholds]
    gone = [item for item in before.artefacts if item.precision not in thresholds]
    files: dict[str, Callable[[], bytes]] = {
        name: partial(with_threshold, bundle.file(name), limit) for name, limit in _defaults(kept, thresholds).items()
    }
    if REPORT in before.files and (page := _report(bundle)) is not None:
        files[REPORT] = partial(bytes, page)
    manifest = dataclasses.replace(
        before,
        thresholds=dict(thresholds),
        calibration=calibration,
        artefacts=tuple(_renamed_source(item, files) for item in kept),
        metrics={name: value for name, value in before.metrics.items() if name not in _AT_T},
    )
    return manifest, _left(gone, kept), files


def _left(gone: Sequence[Artefact], kept: Sequence[Artefact]) -> tuple[str, ...]:
    still = {item.file for item in kept}
    words = []
    for precision in dict.fromkeys(item.precision for item in gone):
        files = [item.file for item in gone if item.precision == precision and item.file not in still]
        words.append(f"{precision} ({', '.join(files)})" if files else precision)
    return tuple(words)


def _defaults(artefacts: Sequence[Artefact], thresholds: Mapping[str, Thresholds]) -> dict[str, float]:
    """ONNX file -> its default T: that of the file's own precision, not of bf16."""
    found: dict[str, float] = {}
    for item in sorted(artefacts, key=lambda item: item.precision in IN_BF16):
        if item.kind == "onnx":
            found.setdefault(item.file, thresholds[item.precision].pixel.at())
    return found


def _renamed_source(artefact: Artefact, files: Mapping[str, Callable[[], bytes]]) -> Artefact:
    """Update the hash by which an engine names its graph, whose default T alone has changed."""
    source = artefact.options.get("source")
    if artefact.kind != "engine" or source not in files:
        return artefact
    options = {**artefact.options, "source_sha256": sha256_bytes(files[str(source)]())}
    return dataclasses.replace(artefact, options=options)


def _report(bundle: Bundle) -> bytes | None:
    """The build's report with the banner; None if it has the banner already, or no place for it."""
    text = bundle.file(REPORT).read_text(encoding="utf-8")
    if _BANNER in text or _HEADER_ENDS not in text:
        return None
    return text.replace(_HEADER_ENDS, _HEADER_ENDS + _BANNER, 1).encode()


def _compared(bundle: Bundle, manifest: Manifest, stage: Stage) -> tuple[Manifest, tuple[ParityReport, ...]]:
    """The manifest with parity at the new T, for what runs here, if the bundle has reference frames.

    An artefact that failed before keeps its verdict if it does not run here, and is not an error if it fails again.
    """
    anew = dataclasses.replace(bundle, manifest=manifest)
    frames = bool(read_reference(bundle)[0])
    artefacts, reports, required = [], [], []
    for number, artefact in enumerate(manifest.artefacts):
        stage(number, len(manifest.artefacts), artefact.file)
        failed = artefact.parity is not None and not artefact.parity.passed
        report = _at_new_thresholds(anew, artefact) if frames else None
        if report is not None:
            reports.append(report)
            if not failed:
                required.append(report)
            artefact = dataclasses.replace(artefact, parity=report.summary())
        elif not failed:  # flips were counted at the old T
            artefact = dataclasses.replace(artefact, parity=None)
        artefacts.append(artefact)
    require(required, "nothing was written; --precision with the others leaves this one out, or build the bundle again")
    return dataclasses.replace(manifest, artefacts=tuple(artefacts)), tuple(reports)


def _at_new_thresholds(bundle: Bundle, artefact: Artefact) -> ParityReport | None:
    try:
        engine = open_artefact(bundle, artefact)
    except BackendError:  # an engine for another machine; the graphs were opened before
        return None
    with engine:
        return compare_artefact(engine, stored_source(bundle), artefact.file)


def _written(
    bundle: Bundle,
    manifest: Manifest,
    files: Mapping[str, Callable[[], bytes]],
    target: str | os.PathLike[str] | None,
) -> Bundle:
    def fill(folder: Path) -> None:
        for name, content in files.items():  # one at a time: a graph may have gigabytes
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content())

    kept = {item.file for item in manifest.artefacts}
    drop = tuple(item.file for item in bundle.manifest.artefacts if item.file not in kept)
    return update_bundle(bundle, manifest, fill, drop, target)
