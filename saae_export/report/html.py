"""The build report: `write_report(path, ReportData)` writes one self-contained HTML file.

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

from saae_export.report.data import (
    Curve,
    Example,
    Facts,
    FitHistory,
    LatencyRow,
    MetricRow,
    ParityRow,
    ReportData,
    Scores,
    SelfTestView,
    ThresholdSet,
)
from saae_runtime.files import write_text
from saae_runtime.geometry import resize_frames
from saae_runtime.render import encode_png, heatmap, overlay, ramp
from saae_runtime.thresholds import ThresholdTable
from saae_train.charts.svg import Series, bar_chart, histogram, line_chart, plain_text, rate_chart, smooth

__all__ = [
    "Curve",
    "Example",
    "Facts",
    "FitHistory",
    "LatencyRow",
    "MetricRow",
    "ParityRow",
    "ReportData",
    "Scores",
    "SelfTestView",
    "ThresholdSet",
    "render_report",
    "write_report",
]

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
)


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Writes the report atomically; see `saae_export.report.data` for an example of filling it.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
        FrameError: an example's arrays do not fit each other.
    """
    write_text(path, render_report(data))


def render_report(data: ReportData) -> str:
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
    sections = list(_SECTIONS)
    if data.next_commands:
        sections.append(("next", "Next"))
    return page.render(
        data=data,
        css=Markup(css),
        verdict=_verdict(data.parity),
        tiles=_tiles(data),
        sections=sections,
        metric_names=list(dict.fromkeys(name for row in data.metrics for name in row.values)),
        any_reason=any(row.reasons for row in data.metrics),
        histogram=_histogram(data.scores),
        decisions=_decisions(data.scores),
        curves=[(plain_text(curve.title) + _area(curve), svg) for curve in data.curves if (svg := _curve(curve))],
        self_test_chart="" if data.self_test is None else _data_address(data.self_test.chart),
        simulated_examples=[] if data.self_test is None else [_example(item) for item in data.self_test.examples],
        thresholds=_thresholds(data.thresholds),
        latency_chart=_latency_chart(data.latency),
        fit=_fit(data.fit),
        examples=[_example(example) for example in data.worst],
        ramp=", ".join(f"rgb({r},{g},{b})" for r, g, b in ramp()[::15].tolist()),
    )


def _verdict(rows: Sequence[ParityRow]) -> dict[str, Any]:
    failed = [row.artefact for row in rows if row.parity is not None and not row.parity.passed]
    checked = sum(row.parity is not None for row in rows)
    unchecked = len(rows) - checked
    if failed:
        return {"css": "bad", "text": f"parity failed: {len(failed)} of {checked}", "failed": failed}
    if not checked:
        return {"css": "none", "text": "parity not checked", "failed": []}
    text = f"parity passed: {checked} artefact{'s' if checked > 1 else ''}"
    return {"css": "good", "text": text + (f", {unchecked} not checked" if unchecked else ""), "failed": []}


def _tiles(data: ReportData) -> list[dict[str, str]]:
    tiles = []
    note = " (synthetic)" if data.synthetic else ""
    if data.metrics:
        headline = [(name, value) for name, value in data.metrics[0].values.items() if _is_number(value)]
        tiles += [{"value": _percent(value), "name": name + note} for name, value in headline[:4]]
    if data.self_test is not None and data.self_test.easy is not None:
        tiles.append(
            {"value": f"{100 * data.self_test.easy:.0f} %", "name": "of large, strong SIMULATED defects found" + note}
        )
    timed = [row for row in data.latency if _is_number(row.median_ms)]
    if timed:
        best = min(timed, key=lambda row: row.median_ms)
        tiles.append({"value": _milliseconds(best.median_ms), "name": f"per frame, {best.backend} {best.precision}"})
    if data.scores is not None and _is_number(data.scores.threshold):
        tiles.append({"value": f"{data.scores.threshold:.4g}", "name": "image threshold"})
    return tiles


def _groups(scores: Scores) -> list[tuple[str, Any]]:
    return [
        (scores.held_out_label, scores.held_out),
        ("test, good", scores.test_good),
        ("test, defective", scores.test_defective),
    ]


def _histogram(scores: Scores | None) -> Markup:
    if scores is None:
        return Markup("")
    return Markup(histogram(_groups(scores), title="Image scores", x_label="image score", threshold=scores.threshold))


def _decisions(scores: Scores | None) -> list[dict[str, Any]]:
    """How many images of each group lie above the image threshold, and how many of those decisions are wrong."""
    threshold = None if scores is None else scores.threshold
    if scores is None or threshold is None or not math.isfinite(threshold):
        return []
    rows = []
    for (name, values), defective in zip(_groups(scores), (False, False, True), strict=True):
        found = np.asarray(values, np.float64).reshape(-1)
        above = int((found > threshold).sum())
        wrong = found.size - above if defective else above
        word = "missed" if defective else "false alarm" + ("s" if wrong > 1 else "")
        if found.size:
            words = f"{wrong} {word}" if wrong else "all right"
            rows.append({"name": name, "count": found.size, "above": above, "wrong": wrong, "words": words})
    return rows


def _curve(curve: Curve) -> Markup:
    return Markup(
        rate_chart(
            curve.x,
            curve.y,
            title=plain_text(curve.title),
            x_label=curve.x_label,
            y_label=curve.y_label,
            limit=curve.limit,
            chance=curve.chance,
            dot=curve.dot,
        )
    )


def _area(curve: Curve) -> str:
    if not _is_number(curve.area):
        return ""
    limit = f", area up to FPR {curve.limit:g}" if curve.limit is not None else ", area"
    return f"{limit} {_percent(curve.area)}"


def _thresholds(sets: Sequence[ThresholdSet]) -> dict[str, Any]:
    kinds: tuple[tuple[str, list[tuple[str, ThresholdTable]]], ...] = (
        ("pixels", [(entry.precision, entry.pixel) for entry in sets if entry.pixel is not None]),
        ("images", [(entry.precision, entry.image) for entry in sets if entry.image is not None]),
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
            default = (first.default_fpr, f"default {first.default_fpr:g}") if first.default_fpr > 0 else None
            svg = line_chart(
                [Series(precision, table.fpr, table.threshold) for precision, table in tables[:4]],
                title=f"Threshold of {kind} by false-positive rate",
                x_label="acceptable false-positive rate",
                y_label="T",
                x_log=True,
                x_mark=default,
            )
            charts.append((f"T of {kind} by acceptable FPR", Markup(svg)))
    return {"rows": rows, "rates": [f"{rate:g}" for rate in _RATES], "charts": charts}


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


def _fit(fit: FitHistory | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    loss = np.asarray(fit.loss, np.float64).reshape(-1)
    if not loss.size:
        return None
    at, means = smooth(loss)
    steps = np.asarray(fit.steps, np.float64).reshape(-1)
    known = steps.size == loss.size
    place = np.interp(at, np.arange(loss.size), steps) if known else at + 1
    # A loss that falls by more than ten times is flat on a linear axis.
    falls = means.size > 0 and means.min() > 0 and means.max() > 10 * means.min()
    svg = line_chart(
        [Series("loss", place, means)],
        title="Loss",
        x_label=fit.unit,
        y_label="loss (log)" if falls else "loss",
        y_log=bool(falls),
    )
    last = int(steps[-1]) if known and math.isfinite(steps[-1]) else loss.size
    words = f"Loss {loss[0]:.4g} at the start, {loss[-1]:.4g} after {last} {plain_text(fit.unit)}s"
    if fit.seconds is not None:
        words += f", in {_duration(fit.seconds)}"
    words += "."
    if fit.stopped:
        words += f" Ended early: {plain_text(fit.stopped)}."
    return {"chart": Markup(svg), "summary": words}


def _example(example: Example) -> dict[str, Any]:
    mask = np.asarray(example.anomaly_map) > example.threshold
    panels = [
        ("input", example.frame),
        ("heatmap", heatmap(example.anomaly_map, example.threshold)),
        ("overlay", overlay(example.frame, example.anomaly_map, mask, threshold=example.threshold)),
    ]
    if example.truth is not None:
        # Laid over an empty map: the frame as it is, with the truth's outline alone.
        empty = np.zeros(mask.shape, np.float32)
        panels.append(("ground truth", overlay(example.frame, empty, threshold=1.0, truth=example.truth)))
    height, width = mask.shape
    scale = min(1.0, _THUMBNAIL / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    score = f"score {example.score:.4g}"
    if example.image_threshold is not None:
        above = example.score > example.image_threshold
        score += f" {'>' if above else '≤'} T {example.image_threshold:.4g}: {'defect' if above else 'clean'}"
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
