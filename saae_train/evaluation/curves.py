"""Curves ready to be drawn, and the qualitative sheet of the paper's Figure 3.

A curve over millions of pixels has millions of corners; a picture shows a thousand. `decimate` keeps points
at even distances along the curve, so that steep and flat parts are drawn alike, and states how far any
dropped point can lie from the drawn line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saae_runtime import render
from saae_runtime.errors import DataError
from saae_runtime.geometry import resize_frames
from saae_train.charts.svg import rate_chart
from saae_train.evaluation.ranking import (
    Metric,
    Ranking,
    average_precision_of,
    best_f1_of,
    pro_auc_of,
    pro_points,
    roc_auc_of,
    roc_points,
)

Array = NDArray[np.float64]

_UNKNOWN = 128  # gray of a ground truth that nobody gave


@dataclass(frozen=True)
class Curve:
    """One curve, both axes in 0..1, ends included.

    `area` is the exact metric, not that of the drawn points; `limit` the x up to which it counts; `chance` says whether
    the diagonal is what guessing gives; `dot` is a marked point (x, y) and its label.
    """

    title: str
    x: Array
    y: Array
    x_label: str
    y_label: str
    area: Metric
    limit: float | None = None
    chance: bool = True
    dot: tuple[float, float, str] | None = None

    def to_json(self) -> dict[str, object]:
        """Points rounded to five digits, which no plot can show."""
        return {
            "title": self.title,
            "x": [round(float(v), 5) for v in self.x],
            "y": [round(float(v), 5) for v in self.y],
            "x_label": self.x_label,
            "y_label": self.y_label,
            "area": self.area.to_json(),
            "limit": self.limit,
            "dot": None if self.dot is None else list(self.dot),
        }

    @property
    def heading(self) -> str:
        """The title with the area in percent."""
        until = "" if self.limit is None else f" up to FPR {self.limit:g}:"
        return self.title if self.area.value is None else f"{self.title}, area{until} {self.area.percent} %"

    def chart(self) -> str:
        """The curve drawn as SVG, see `charts.rate_chart`."""
        return rate_chart(
            self.x,
            self.y,
            title=self.heading,
            x_label=self.x_label,
            y_label=self.y_label,
            limit=self.limit,
            chance=self.chance,
            dot=self.dot,
        )


def decimate(x: ArrayLike, y: ArrayLike, points: int = 400) -> tuple[Array, Array]:
    """At most `points` of a curve's points, both ends included, evenly spaced along it.

    x, y [n]. Distance is |dx| + |dy|; with a total length L, every dropped point lies within L / (points - 1)
    of a kept one (for a monotone curve in the unit square L <= 2).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if points < 2:
        raise ValueError("a curve needs at least two points")
    if x.size <= points:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    marks = np.linspace(0.0, length[-1], points)
    # Of two equal positions the last stands for both; rounding must not lose the ends.
    keep = np.unique(np.clip(np.searchsorted(length, marks, side="right") - 1, 0, x.size - 1))
    keep = np.unique(np.concatenate([[0], keep, [x.size - 1]]))
    if keep.size > points:
        keep = np.delete(keep, 1)
    return x[keep], y[keep]


def curves(ranking: Ranking, limit: float = 0.3, points: int = 400) -> list[Curve]:
    """ROC, PRO (when there are regions) and precision-recall of one ranking; [] when it has one class only."""
    if ranking.missing():
        return []
    noun = ranking.noun
    found = [
        Curve(
            f"{noun} ROC",
            *decimate(*roc_points(ranking), points),
            "false-positive rate",
            "true-positive rate",
            roc_auc_of(ranking),
        )
    ]
    if ranking.regions:
        x, y = pro_points(ranking)
        found.append(
            Curve(
                "per-region overlap",
                *decimate(x, y, points),
                "false-positive rate",
                "mean region overlap",
                pro_auc_of(ranking, limit),
                limit,
            )
        )
    tp = np.cumsum(ranking.positives)
    recall, precision = tp / tp[-1], tp / (tp + ranking.level)
    best = best_f1_of(ranking)
    dot = None
    if best.f1.value is not None and best.threshold is not None:
        # `value` is descending: what lies above the best threshold ends here.
        at = int(np.searchsorted(-ranking.value.astype(np.float64), -best.threshold, side="left")) - 1
        label = f"best F1 {best.f1.percent} % at T {best.threshold:.4g}"
        dot = (float(recall[at]), float(precision[at]), label)
    found.append(
        Curve(
            f"{noun} precision-recall",
            *decimate(np.concatenate([[0.0], recall]), np.concatenate([precision[:1], precision]), points),
            "recall",
            "precision",
            average_precision_of(ranking),
            chance=False,
            dot=dot,
        )
    )
    return found


@dataclass(frozen=True)
class Shown:
    """One column of the sheet: frame uint8 [H, W, 3] RGB; truth bool [H, W], None where it is not known; anomaly_map
    float32 [H, W]."""

    title: str
    frame: NDArray[np.uint8]
    truth: NDArray[np.bool_] | None
    anomaly_map: NDArray[np.float32]


def qualitative_sheet(columns: Sequence[Shown], threshold: float, cell: int = 256) -> NDArray[np.uint8]:
    """Figure 3 of the paper: one column an image; rows input, ground truth, map, segmentation at T.

    Each picture keeps its proportions inside a cell x cell square. T has the same colour in every map. A truth that is
    not known is gray: black would say that there is no defect.

    Returns:
        uint8 [height, width, 3] RGB, for `saae_runtime.render.save_png`.

    Raises:
        DataError: there is no column.
    """
    if not columns:
        raise DataError("The sheet has no image to show.", "It was given no column.", "choose at least one test image")
    gap, left, top = 6, 104, 26
    height, width = top + 4 * (cell + gap), left + len(columns) * (cell + gap)
    page = np.full((height, width, 3), 255, np.uint8)
    for i, shown in enumerate(columns):
        unknown = np.full_like(shown.frame, _UNKNOWN)
        rows = (
            shown.frame,
            unknown if shown.truth is None else _black_and_white(shown.truth),
            render.heatmap(shown.anomaly_map, threshold),
            _black_and_white(shown.anomaly_map > threshold),
        )
        for j, picture in enumerate(rows):
            y, x = top + j * (cell + gap), left + i * (cell + gap)
            page[y : y + cell, x : x + cell] = _fit(picture, cell)
    return _label(page, [c.title for c in columns], cell, gap, left, top)


def _black_and_white(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.repeat(mask.astype(np.uint8)[:, :, None] * np.uint8(255), 3, axis=2)


def _fit(picture: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    out = np.full((cell, cell, 3), 235, np.uint8)
    y, x = (cell - size[0]) // 2, (cell - size[1]) // 2
    out[y : y + size[0], x : x + size[1]] = resize_frames(picture, size)
    return out


def _label(
    page: NDArray[np.uint8], titles: Sequence[str], cell: int, gap: int, left: int, top: int
) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(page)
    pen = ImageDraw.Draw(canvas)
    ink, font = (30, 30, 30), render.font_of_size(14)
    for i, title in enumerate(titles):
        pen.text((left + i * (cell + gap), top - 20), title[: cell // 7], fill=ink, font=font)
    for j, name in enumerate(("input", "ground truth", "anomaly map", "segmentation")):
        pen.text((6, top + j * (cell + gap) + cell // 2 - 8), name, fill=ink, font=font)
    return np.asarray(canvas)
