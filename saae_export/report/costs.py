"""What an image threshold costs: false alarms and misses by the requested rate, and which images flip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from saae_runtime.estimate import highest_rate
from saae_runtime.thresholds import ThresholdTable
from saae_train.charts.svg import Series, line_chart

from .data import Report

__all__ = ["costs"]

_RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
_COLUMNS = (
    "false alarms in 1000",
    "T",
    "good images above",
    "at most in 1000 (95 %)",
    "real defects missed",
    "large, strong simulated missed",
    "all simulated missed",
)
_LISTED = 6  # names of flipping images per row
_FLIPS_WITHIN = 5.0  # times the default rate, either way


def costs(report: Report) -> dict[str, Any] | None:
    """The table, the curve and the flips; None unless thresholds follow from a model of the scores.

    False alarms per thousand are those expected by the threshold table; beside them, the calibration images above T and
    the upper bound of their rate at 95 % confidence. "All simulated missed" weights every kind, size and contrast
    equally, as the self-test does.
    """
    table = _image_table(report)
    if table is None or table.rule != "log-normal":
        return None
    images = () if report.evaluation is None else report.evaluation.images
    real = np.array([image.score for image in images if image.is_anomalous], np.float64)
    drawn = () if report.self_test is None else report.self_test.defects
    easy = np.array([defect.score for defect in drawn if defect.easy], np.float64)
    scores = np.asarray(report.held_out_scores, np.float64)
    rows = []
    for rate in sorted({*_RATES, table.default_fpr}):
        limit = table.at(rate)
        above = int((scores > limit).sum())
        simulated = _simulated_missed(report, limit)
        rows.append(
            {
                "default": rate == table.default_fpr,
                "cells": [
                    f"{1000 * rate:.3g}",
                    f"{limit:.4g}",
                    f"{above} of {scores.size}",
                    f"{1000 * highest_rate(above, scores.size):.0f}" if scores.size else "-",
                    _missed(real, limit),
                    _missed(easy, limit),
                    "-" if simulated is None else f"{100 * simulated:.0f} %",
                ],
            }
        )
    return {"rows": rows, "columns": _COLUMNS, "chart": _chart(report, table, real), "flips": _flips(report, table)}


def _image_table(report: Report) -> ThresholdTable | None:
    """The image table of the precision that gave the report's threshold."""
    tables = [pair.image for pair in report.manifest.thresholds.values()]
    limit = report.image_threshold
    if not tables or limit is None:
        return None
    return min(tables, key=lambda table: abs(table.at() - limit))


def _missed(scores: NDArray[np.float64], limit: float) -> str:
    return f"{int((scores <= limit).sum())} of {scores.size}" if scores.size else "-"


def _simulated_missed(report: Report, limit: float) -> float | None:
    """Share of the simulated defects at or below a threshold, every kind, size and contrast weighted equally."""
    groups: dict[tuple[str, str, str], list[bool]] = {}
    for defect in () if report.self_test is None else report.self_test.defects:
        groups.setdefault((defect.kind, defect.size, defect.contrast), []).append(defect.score <= limit)
    return float(np.mean([np.mean(group) for group in groups.values()])) if groups else None


def _chart(report: Report, table: ThresholdTable, real: NDArray[np.float64]) -> Markup:
    """Misses, and calibration images above T, over the false-alarm rate."""
    pairs = [
        (rate, limit)
        for rate, limit in zip(table.fpr, table.threshold, strict=True)
        if min(_RATES[0], table.default_fpr or 1.0) <= rate <= 0.5
    ]
    rates = [1000 * rate for rate, _ in pairs]
    good = np.asarray(report.held_out_scores, np.float64)
    series = []
    if good.size:
        series.append(Series("good above T", rates, [100 * float((good > limit).mean()) for _, limit in pairs]))
    if real.size:
        series.append(Series("real missed", rates, [100 * float((real <= limit).mean()) for _, limit in pairs]))
    simulated = [_simulated_missed(report, limit) for _, limit in pairs]
    if all(share is not None for share in simulated):
        series.append(Series("simulated missed", rates, [100 * (share or 0.0) for share in simulated]))
    place = 1000 * table.default_fpr
    return Markup(
        line_chart(
            series,
            title="What the threshold costs",
            x_label="false alarms in 1000 good parts, asked for",
            y_label="percent of the images",
            x_log=True,
            y_range=(0.0, 100.0),
            x_mark=(place, f"default {place:g} in 1000") if place > 0 else None,
        )
    )


def _flips(report: Report, table: ThresholdTable) -> list[dict[str, Any]]:
    """Test images whose verdict another rate would change, the one nearest to the default threshold first."""
    images = () if report.evaluation is None else report.evaluation.images
    default = table.at()
    rows = []
    for rate in _RATES:
        limit = table.at(rate)
        if limit == default or abs(math.log(rate / max(table.default_fpr, _RATES[0]))) > math.log(_FLIPS_WITHIN) + 1e-9:
            continue
        between = sorted(
            (image for image in images if (image.score > limit) != (image.score > default)),
            key=lambda image: abs(math.log(max(image.score, 1e-30) / default)),
        )
        for defective in (False, True):
            flipped = [image.file for image in between if image.is_anomalous == defective]
            if flipped:
                rows.append(
                    {
                        "rate": f"{1000 * rate:.3g}",
                        "words": _words(defective, limit > default, len(flipped)),
                        "names": _listed(flipped),
                    }
                )
    return rows


def _words(defective: bool, higher: bool, count: int) -> str:
    what = f"{count} {'defective' if defective else 'good'} image{'s' if count > 1 else ''}"
    if defective:
        return f"{what} more would be missed" if higher else f"{what} more would be found"
    return f"{what} would no longer be called defective" if higher else f"{what} more would be called defective"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
