"""The build report: `write_report(path, Report)` writes one self-contained HTML file.

The page is the Jinja template report.html with report.css inside it; charts are inline SVG (saae_train.charts.svg),
pictures are base64 PNG. It loads nothing and runs no script, and whatever a user supplied is escaped.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from saae_runtime.estimate import LEAST_RATE
from saae_runtime.files import write_text
from saae_runtime.geometry import resize_frames
from saae_runtime.manifest import Artefact, Calibration, Thresholds
from saae_runtime.render import encode_png, heatmap, overlay, ramp
from saae_runtime.result import decision
from saae_runtime.shell import shell_line
from saae_train.charts.svg import Series, bar_chart, histogram, line_chart, plain_text, smooth
from saae_train.evaluation.decisions import decide
from saae_train.evaluation.ranking import METRIC_NAMES
from saae_train.evaluation.result import Evaluation
from saae_train.record import FitRecord
from saae_train.selftest.chart import chart
from saae_train.selftest.result import SelfTest
from saae_train.selftest.simulate import CONTRASTS, SIZES

from .costs import costs
from .data import Example, LatencyRow, Report, outline

__all__ = ["render_report", "write_report"]

_THUMBNAIL = 320  # pixels of a panel's longer side
_RATES = (0.0, 1e-4, 1e-3, 1e-2, 5e-2)
_SECTIONS = (
    ("built", "What was built"),
    ("quality", "Quality"),
    ("self-test", "Self-test"),
    ("thresholds", "Thresholds"),
    ("parity", "Parity"),
    ("latency", "Latency"),
    ("images", "Images"),
    ("fit", "Fit"),
    ("next", "Next"),
)
_METRICS = (
    "pixel_roc_auc",
    "pro_auc",
    "image_roc_auc",
    "pixel_average_precision",
    "pixel_fpr_good",
    "pixel_fpr_halo",
    "pixel_tpr",
    "image_fpr",
    "image_tpr",
)


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report atomically.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
        FrameError: an example's arrays do not fit each other.
    """
    write_text(path, render_report(report))


def render_report(report: Report) -> str:
    """The report as HTML text.

    Raises:
        FrameError: an example's arrays do not fit each other.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        plain=plain_text, fact=_fact, metric=_percent, error=_error, ms=_milliseconds, fps=_frames_per_second
    )
    environment.tests["digest"] = lambda value: bool(re.fullmatch(r"[0-9a-fA-F]{32,128}", str(value)))
    folder = resources.files("saae_export.report")
    page = environment.from_string(folder.joinpath("report.html").read_text(encoding="utf-8"))
    css = folder.joinpath("report.css").read_text(encoding="utf-8")
    groups = _score_groups(report)
    evaluation = report.evaluation
    return page.render(
        report=report,
        manifest=report.manifest,
        css=Markup(css),
        verdict=_verdict(report.manifest.artefacts),
        tiles=_tiles(report),
        sections=_SECTIONS,
        facts=_facts(report),
        notes=() if evaluation is None else evaluation.notes,
        metrics=None if evaluation is None else _metrics(evaluation),
        histogram=_histogram(groups, report.image_threshold),
        decisions=_decisions(groups, report.image_threshold),
        costs=costs(report),
        curves=[] if evaluation is None else [(curve.heading, Markup(curve.chart())) for curve in evaluation.curves],
        self_test=None if report.self_test is None else _self_test(report.self_test),
        simulated=[_example(item) for item in report.simulated],
        thresholds=_thresholds(report.manifest.thresholds),
        latency_chart=_latency_chart(report.latency),
        fit=_fit(report.record),
        examples=[_example(item) for item in report.examples],
        next_commands=_next_commands(report.bundle),
        ramp=", ".join(f"rgb({r},{g},{b})" for r, g, b in ramp()[::15].tolist()),
    )


def _verdict(artefacts: Sequence[Artefact]) -> dict[str, Any]:
    failed = [item.file for item in artefacts if item.parity is not None and not item.parity.passed]
    checked = sum(item.parity is not None for item in artefacts)
    unchecked = len(artefacts) - checked
    if failed:
        return {"css": "bad", "text": f"parity failed: {len(failed)} of {checked}", "failed": failed}
    if not checked:
        return {"css": "none", "text": "parity not checked", "failed": []}
    text = f"parity passed: {checked} artefact{'s' if checked > 1 else ''}"
    return {"css": "good", "text": text + (f", {unchecked} not checked" if unchecked else ""), "failed": []}


def _tiles(report: Report) -> list[dict[str, str]]:
    tiles = []
    note = " (synthetic)" if report.manifest.synthetic else ""
    if report.evaluation is not None:
        if report.image_threshold is not None:
            images = report.evaluation.images
            found = decide([i.score for i in images], [i.is_anomalous for i in images], report.image_threshold)
            if found.defective:
                tiles.append({"value": f"{found.found} of {found.defective}", "name": f"defective images found{note}"})
            if found.good:
                tiles.append(
                    {"value": f"{found.false_alarms} of {found.good}", "name": f"good images called defective{note}"}
                )
        metrics = [(METRIC_NAMES[name], report.evaluation.overall.metrics.get(name)) for name in _METRICS]
        headline = [(name, metric.value) for name, metric in metrics if metric is not None and metric.value is not None]
        tiles += [{"value": _percent(value), "name": name + note} for name, value in headline[:4]]
    if report.self_test is not None and report.self_test.judged:
        share = f"{100 * (report.self_test.easy.value or 0.0):.0f} %"
        tiles.append({"value": share, "name": "of large, strong SIMULATED defects found" + note})
    if report.latency:
        best = min(report.latency, key=lambda row: row.median_ms)
        tiles.append({"value": _milliseconds(best.median_ms), "name": f"per frame, {best.backend} {best.precision}"})
    if _is_number(report.image_threshold):
        tiles.append({"value": f"{report.image_threshold:.4g}", "name": "image threshold"})
    return tiles


def _facts(report: Report) -> list[tuple[str, dict[str, object]]]:
    """Titled lists of facts about the build."""
    manifest = report.manifest
    model, backbone, frame, calibration = manifest.model, manifest.backbone, manifest.frame, manifest.calibration
    size = "the camera's own, resized inside the graph" if frame.baked else "the model's"
    return [
        (
            "Data",
            {
                "images": report.source,
                "calibrated on": _calibrated_on(calibration),
                "calibration digest": calibration.digest,
                "thresholds computed with": report.calibrated_with,
                "metrics and examples computed with": report.shown_with,
            },
        ),
        (
            "Backbone",
            {"name": backbone.name, "weights": backbone.weights_source, "weights sha256": backbone.weights_sha256},
        ),
        (
            "Model",
            {
                "frame": f"{frame.height} x {frame.width} pixels, {size}",
                "model input": f"{model.height} x {model.width} pixels, patch {model.patch}",
                "layers": list(model.layers),
                "autoencoder": model.autoencoder,
                "latent V": model.latent_dim,
                "components": model.components,
                "loss": model.loss,
                "score": model.score,
                "preset": model.preset,
            },
        ),
        ("Versions", {"saae": manifest.saae_version, **manifest.tools}),
    ]


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Headings, and one row for all images and for each defect type."""
    names = [name for name in _METRICS if name in evaluation.overall.metrics]
    rows = []
    for subset in (evaluation.overall, *evaluation.by_type):
        found = [(METRIC_NAMES[name], subset.metrics[name]) for name in names]
        reasons = [f"{name}: {metric.reason}" for name, metric in found if metric.value is None]
        cells = [metric.value for _, metric in found]
        rows.append({"label": subset.label, "images": subset.images, "cells": cells, "reasons": "; ".join(reasons)})
    return {
        "names": [METRIC_NAMES[name] for name in names],
        "rows": rows,
        "any_reason": any(row["reasons"] for row in rows),
    }


def _score_groups(report: Report) -> list[tuple[str, Any]]:
    """Image scores of the calibration images and of the test set's good and defective ones."""
    images = () if report.evaluation is None else report.evaluation.images
    return [
        (_normal_words(report.manifest.calibration), report.held_out_scores),
        ("test, good", [row.score for row in images if not row.is_anomalous]),
        ("test, defective", [row.score for row in images if row.is_anomalous]),
    ]


def _histogram(groups: list[tuple[str, Any]], threshold: float | None) -> Markup:
    if not any(len(scores) for _, scores in groups):
        return Markup("")
    return Markup(histogram(groups, title="Image scores", x_label="image score", threshold=threshold))


def _decisions(groups: list[tuple[str, Any]], threshold: float | None) -> list[dict[str, Any]]:
    """Per group, the number of images above the image threshold, and the number of wrong decisions."""
    if threshold is None or not math.isfinite(threshold):
        return []
    rows = []
    for (name, values), defective in zip(groups, (False, False, True), strict=True):
        found = np.asarray(values, np.float64).reshape(-1)
        above = int((found > threshold).sum())
        wrong = found.size - above if defective else above
        word = "missed" if defective else "false alarm" + ("s" if wrong > 1 else "")
        if found.size:
            words = f"{wrong} {word}" if wrong else "all right"
            rows.append({"name": name, "count": found.size, "above": above, "wrong": wrong, "words": words})
    return rows


def _self_test(result: SelfTest) -> dict[str, Any]:
    rows = []
    for kind in (*result.kinds, None):
        shares = [result.share(kind, size=name) for name in SIZES]
        shares += [result.share(kind, contrast=name) for name in CONTRASTS]
        counts = [f"{share.found} of {share.count}" if share.count else "-" for share in shares]
        totals = (result.balanced_text(kind), result.balanced_text(kind, marked=True))
        rows.append((kind or "all", [*counts, *totals]))
    return {
        "chart": _data_address(chart(result)),
        "columns": [*SIZES, *CONTRASTS, "all", "marked"],
        "rows": rows,
        "misses_easy": result.misses_easy,
        "banner": f"Defects were drawn by a program onto normal images: {result.easy} large, strong ones were found. "
        "See the self-test below; nothing else in this report is simulated.",
        "summary": f"Large and strong: {result.easy} found. "
        f"All and marked weight every kind, size and contrast equally: {result.balanced_text()} found. "
        f"Simulated pixel ROC-AUC {result.pixel_roc_auc.percent}, PRO-AUC {result.pro_auc.percent}.",
        "notes": result.notes(),
    }


def _thresholds(thresholds: Mapping[str, Thresholds]) -> dict[str, Any]:
    kinds = (
        ("pixels", [(precision, pair.pixel) for precision, pair in thresholds.items()]),
        ("images", [(precision, pair.image) for precision, pair in thresholds.items()]),
    )
    rows, charts = [], []
    for kind, tables in kinds:
        for precision, table in tables:
            rows.append(
                {
                    "precision": precision,
                    "of": kind,
                    "default_fpr": f"{table.default_fpr:g}",
                    "value": f"{table.at():.4g}",
                    "levels": [f"{table.at(rate):.4g}" for rate in _RATES],
                    "count": f"{table.count:,}",
                }
            )
        if tables:
            first = tables[0][1]
            smallest = next((rate for rate in first.fpr if rate > 0), 1.0)
            # 0 is marked at the left end of the logarithmic axis.
            place = first.default_fpr or smallest
            default = (place, f"default {first.default_fpr:g}")
            svg = line_chart(
                [Series(precision, table.fpr, table.threshold) for precision, table in tables[:4]],
                title=f"Threshold of {kind} by false-positive rate",
                x_label="acceptable false-positive rate",
                y_label="T",
                x_log=True,
                x_mark=default,
            )
            charts.append((f"T of {kind} by acceptable FPR", Markup(svg)))
    rules = {kind: {table.rule for _, table in tables} for kind, tables in kinds}
    return {
        "rows": rows,
        "rates": [f"{rate:g}" for rate in _RATES],
        "charts": charts,
        "counted": " and ".join(kind for kind, found in rules.items() if "quantile" in found),
        "estimated": " and ".join(kind for kind, found in rules.items() if "log-normal" in found),
        "least": f"{LEAST_RATE:g}",
    }


def _latency_chart(rows: Sequence[LatencyRow]) -> Markup:
    bars = [
        (
            f"{row.backend} {row.precision}" + (f", batch {row.batch}" if row.batch != 1 else ""),
            float(row.median_ms),
            float(row.p95_ms),
            f"{_milliseconds(row.median_ms)} · {_frames_per_second(row.median_ms)} frames/s",
        )
        for row in rows
    ]
    return Markup(bar_chart(bars, title="Latency", x_label="milliseconds per frame"))


def _fit(record: FitRecord) -> dict[str, Any] | None:
    if not record.loss:
        return None
    steps, loss = (np.asarray(values, np.float64) for values in zip(*record.loss, strict=True))
    at, means = smooth(loss)
    # A loss that falls by more than ten times is flat on a linear axis.
    falls = means.size > 0 and means.min() > 0 and means.max() > 10 * means.min()
    svg = line_chart(
        [Series("loss", np.interp(at, np.arange(loss.size), steps), means)],
        title="Loss",
        x_label="step",
        y_label="loss (log)" if falls else "loss",
        y_log=bool(falls),
    )
    words = f"Loss {loss[0]:.4g} at the start, {loss[-1]:.4g} after {int(steps[-1])} steps"
    if record.seconds_fit is not None:
        words += f", in {_duration(record.seconds_fit)}"
    return {"chart": Markup(svg), "summary": f"{words}."}


def _next_commands(bundle: str) -> list[tuple[str, str]]:
    return [
        ("score images with it", shell_line("saae-run", bundle, "IMAGES", "--overlays", "--out", "results")),
        ("check it on another machine", shell_line("saae-export", "verify", bundle)),
        ("see what this machine can run", shell_line("saae-export", "doctor", bundle)),
    ]


def _example(example: Example) -> dict[str, Any]:
    mask = outline(example)
    panels = [
        ("input", example.frame),
        ("heatmap", heatmap(example.anomaly_map, example.threshold)),
        ("overlay", overlay(example.frame, example.anomaly_map, mask, threshold=example.threshold)),
    ]
    if example.truth is not None:
        # Over an empty map: the frame with the outline of the truth.
        empty = np.zeros(mask.shape, np.float32)
        panels.append(("ground truth", overlay(example.frame, empty, threshold=1.0, truth=example.truth)))
    height, width = mask.shape
    scale = min(1.0, _THUMBNAIL / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    score = f"score {example.score:.4g}"
    if example.image_threshold is not None:
        score = decision(example.score, example.image_threshold)
    return {
        "name": example.name,
        "label": example.label,
        "verdict": example.verdict,
        "score": score,
        "height": size[0],
        "width": size[1],
        "panels": [(caption, _data_address(resize_frames(panel, size))) for caption, panel in panels],
    }


def _data_address(picture: np.ndarray[Any, Any]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode("ascii")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(float(value))


def _percent(value: Any) -> str:
    return f"{100 * float(value):.2f} %" if _is_number(value) else "–"


def _error(value: Any) -> str:
    return f"{float(value):.1e}"


def _milliseconds(value: Any) -> str:
    return f"{float(value):.3g} ms" if float(value) < 100 else f"{float(value):.0f} ms"


def _frames_per_second(median_ms: Any) -> str:
    return f"{1000 / float(median_ms):.3g}" if float(median_ms) > 0 else "–"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _fact(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{plain_text(key)} {_fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(item) for item in value)
    return plain_text(value)


def _calibrated_on(calibration: Calibration) -> str:
    """Text that says which images gave the thresholds."""
    if not calibration.left_out:
        return f"{calibration.images} {'held-out ' if calibration.held_out else ''}normal images"
    words = f"{calibration.images} normal images, each scored as if it were new"
    if calibration.near_copies:
        words += f" (without the {calibration.near_copies} before and after it: near-copies)"
    if calibration.outliers:
        words += f"; look at {', '.join(calibration.outliers[:5])}: unlike the others"
    return words


def _normal_words(calibration: Calibration) -> str:
    if calibration.left_out:
        return "normal, left out"
    return "normal, held out" if calibration.held_out else "normal, fitted on"
