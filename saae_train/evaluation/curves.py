"""Curves of an evaluation, ready to be drawn.

A curve over millions of pixels has millions of corners. `decimate` keeps points
at even distances along the curve, so that steep and flat parts are drawn equally well, and states how far any
dropped point can lie from the drawn line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..charts.svg import rate_chart
from .ranking import (
    Metric,
    Ranking,
    average_precision_of,
    best_f1_of,
    pro_auc_of,
    pro_points,
    roc_auc_of,
    roc_points,
)

__all__ = ["Curve", "curves", "decimate"]

Array = NDArray[np.float64]


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

    Distance is |dx| + |dy|; with a total length L, every dropped point lies within L / (points - 1)
    of a kept one (for a monotone curve in the unit square L <= 2).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if points < 2:
        raise ValueError("a curve needs at least two points")
    if x.size <= points:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    marks = np.linspace(0.0, length[-1], points)
    # Of equal positions the last one is kept; rounding must not lose the ends.
    keep = np.unique(np.clip(np.searchsorted(length, marks, side="right") - 1, 0, x.size - 1))
    keep = np.unique(np.concatenate([[0], keep, [x.size - 1]]))
    if keep.size > points:
        keep = np.delete(keep, 1)
    return x[keep], y[keep]


def curves(ranking: Ranking, limit: float = 0.3, points: int = 400) -> list[Curve]:
    """ROC, PRO (if there are regions) and precision-recall of one ranking; empty if it has one class only."""
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
