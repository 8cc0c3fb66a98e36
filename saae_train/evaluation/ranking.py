"""Threshold-free metrics from one exact ranking: ROC-AUC, PRO-AUC, average precision, best F1, rates at T.

Every metric of this project is a function of one curve: walk the threshold down over the distinct
values, and count what lies above it. Only values that a positive (defect pixel, defective image)
takes can bend a curve, so a `Ranking` keeps those and, for each, how many negatives lie above and
how many lie above or level. That is exact, ties included, and its size is the number of positives.

The per-region overlap (PRO) averages the covered share over ground-truth regions, so it is the
true-positive rate with every defect pixel weighted by 1 / (area of its region * number of regions).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saae_runtime.errors import DataError

__all__ = [
    "METRIC_NAMES",
    "BestF1",
    "Floats",
    "Integers",
    "Metric",
    "Ranking",
    "Rates",
    "average_precision_of",
    "best_f1_of",
    "pro_auc_of",
    "pro_points",
    "rates_of",
    "recall_at",
    "require_finite",
    "roc_auc_of",
    "roc_points",
]

METRIC_NAMES = {
    "pixel_roc_auc": "pixel ROC-AUC",
    "pro_auc": "PRO-AUC",
    "image_roc_auc": "image ROC-AUC",
    "pixel_average_precision": "pixel AP",
    "image_average_precision": "image AP",
    "pixel_best_f1": "pixel best F1",
    "image_best_f1": "image best F1",
    "pixel_fpr": "pixel FPR at T",
    "pixel_fpr_good": "FPR at T, good images",
    "pixel_fpr_halo": "FPR at T, around defects",
    "pixel_tpr": "pixel TPR at T",
    "image_fpr": "image FPR at T",
    "image_tpr": "image TPR at T",
}
"""Display names of an evaluation's metrics, by key, the main ones first."""

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]

_INT64_SAFE_SAMPLES = 2**31
"""Above this many samples the products behind ROC-AUC no longer fit an int64."""


@dataclass(frozen=True)
class Metric:
    """One number, or the reason why there is none. Never NaN.

    Attributes:
        value: the metric as a fraction (0..1), or None.
        reason: why `value` is None; empty otherwise.
        error: bound on |value - exact value|: 0.0 if exact, larger if values were binned.
        low, high: 95 % interval; None if not requested or not available.
    """

    value: float | None
    reason: str = ""
    error: float = 0.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a Metric without a value must give its reason")
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"a Metric must be finite, got {self.value}")

    def __float__(self) -> float:
        """The value. Raises DataError with the reason if there is none."""
        if self.value is None:
            raise DataError(
                "this metric has no value",
                self.reason,
                "check `.value is None` first, or evaluate on images that have what is missing",
            )
        return self.value

    def __str__(self) -> str:
        if self.value is None:
            return f"- ({self.reason})"
        text = self.percent
        if self.low is not None and self.high is not None:
            text += f" [{100 * self.low:.2f}, {100 * self.high:.2f}]"
        return text

    @property
    def percent(self) -> str:
        """The value alone in percent, "-" without one."""
        return "-" if self.value is None else f"{100 * self.value:.2f}"

    def with_interval(self, low: float, high: float) -> Metric:
        return replace(self, low=float(low), high=float(high))

    def to_json(self) -> dict[str, float | str | list[float] | None]:
        """`{"value": ...}`, and `reason`, `error` and `interval` if they are set."""
        out: dict[str, float | str | list[float] | None] = {"value": self.value}
        if self.reason:
            out["reason"] = self.reason
        if self.error:
            out["error"] = self.error
        if self.low is not None and self.high is not None:
            out["interval"] = [self.low, self.high]
        return out


class BestF1(NamedTuple):
    """The highest F1 any threshold gives, and that threshold T (`value > T` means defective)."""

    f1: Metric
    threshold: float | None


class Rates(NamedTuple):
    """False- and true-positive rate at a given T (`value > T` means defective)."""

    fpr: Metric
    tpr: Metric


@dataclass(frozen=True)
class Ranking:
    """Counts above each value that a positive takes; see the head of this file.

    Attributes:
        value: n distinct values of the positives, descending (float32 or float64).
        positives: n, int64, positives at exactly this value.
        weight: n, float64, region weight at exactly this value; sums to 1 (all 0 without regions).
        above: n, int64, negatives strictly above the value.
        level: n, int64, negatives above or equal.
        negatives: number of negatives.
        regions: number of ground-truth regions.
        exact: False if values were binned: then each entry is one bin, `value` its lower edge.
        noun: name of a sample in reasons ("pixel" or "image").
    """

    value: Floats
    positives: Integers
    weight: NDArray[np.float64]
    above: Integers
    level: Integers
    negatives: int
    regions: int = 0
    exact: bool = True
    noun: str = "image"

    @property
    def total_positives(self) -> int:
        return int(self.positives.sum())

    @classmethod
    def from_scores(cls, scores: ArrayLike, labels: ArrayLike, noun: str = "image") -> Ranking:
        """Rank samples: n scores (their precision is kept), n labels (true = defective)."""
        s = np.asarray(scores)
        if s.dtype.kind != "f":
            s = s.astype(np.float64)
        s = np.atleast_1d(s).ravel()
        y = np.atleast_1d(np.asarray(labels)).ravel() != 0
        if s.shape != y.shape:
            raise DataError(
                f"{s.size} scores but {y.size} labels",
                "each score needs exactly one label",
                "pass two sequences of the same length",
            )
        require_finite(s, "the scores")
        value, positives = np.unique(s[y], return_counts=True)
        negative = np.sort(s[~y])
        above = negative.size - np.searchsorted(negative, value, side="right")
        level = negative.size - np.searchsorted(negative, value, side="left")
        return cls(
            value[::-1],
            positives[::-1].astype(np.int64),
            np.zeros(value.size),
            above[::-1].astype(np.int64),
            level[::-1].astype(np.int64),
            int(negative.size),
            noun=noun,
        )

    def missing(self) -> str:
        """Why a metric of two classes is not possible; empty if it is."""
        n = self.total_positives
        if n == 0 and self.negatives == 0:
            return f"there is no {self.noun} to evaluate"
        if n == 0:
            return f"no defective {self.noun} in the test set"
        if self.negatives == 0:
            return f"no defect-free {self.noun} in the test set"
        return ""


def require_finite(values: Floats, name: str) -> None:
    """Raise DataError if a value is NaN or infinite."""
    if values.size and not np.isfinite(values).all():
        nan = int(np.isnan(values).sum())
        kind = "NaN" if nan else "infinite"
        count = nan or int(np.isinf(values).sum())
        raise DataError(
            f"{name}: {count} of {values.size} values are {kind}",
            "a metric over such values would be meaningless",
            "look for NaN weights or an FP16 overflow in the model that made them",
        )


def roc_auc_of(r: Ranking) -> Metric:
    """Area under the ROC curve; a tie between a positive and a negative counts one half."""
    if reason := r.missing():
        return Metric(None, reason)
    p, n = r.total_positives, r.negatives
    dtype = np.int64 if p + n < _INT64_SAFE_SAMPLES else np.float64
    twice_lost = np.dot(r.positives.astype(dtype), (r.above + r.level).astype(dtype))
    value = 1.0 - float(twice_lost) / (2.0 * p * n)
    if r.exact:
        return Metric(value)
    tied = np.dot(r.positives.astype(np.float64), (r.level - r.above).astype(np.float64))
    return Metric(value, error=float(tied) / (2.0 * p * n))


def roc_points(r: Ranking) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(FPR, TPR) at every corner of the ROC curve, from (0, 0) to (1, 1); 2n + 2 values each."""
    return _corners(r, np.cumsum(r.positives) / max(r.total_positives, 1))


def pro_points(r: Ranking) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(FPR, mean per-region overlap) at every corner of the PRO curve; 2n + 2 values each."""
    return _corners(r, np.cumsum(r.weight))


def _corners(r: Ranking, y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    n = r.value.size
    fpr = np.empty(2 * n + 2)
    fpr[0], fpr[1:-1:2], fpr[2:-1:2], fpr[-1] = 0.0, r.above, r.level, r.negatives
    fpr /= max(r.negatives, 1)
    out = np.empty(2 * n + 2)
    out[0], out[1], out[2:-1:2], out[3:-1:2], out[-1] = 0.0, 0.0, y, y[:-1], 1.0
    return fpr, out


def pro_auc_of(r: Ranking, limit: float = 0.3) -> Metric:
    """Area under the PRO curve for FPR in [0, limit], divided by limit (paper section 4.1.3).

    Trapezoid over the exact curve; the overlap at FPR = limit is interpolated linearly between the
    neighbouring points. FPR is over all defect-free pixels of all images, as in the MVTec AD
    evaluation.
    """
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit must be in (0, 1], got {limit}")
    if reason := r.missing():
        return Metric(None, reason)
    if r.regions == 0:
        return Metric(None, "no ground-truth region in the test set")
    x, y = pro_points(r)
    inside = int(np.searchsorted(x, limit, side="right"))  # x[:inside] <= limit
    area = 0.5 * float(np.dot(np.diff(x[:inside]), y[: inside - 1] + y[1:inside]))
    last = inside - 1
    if inside < x.size:
        slope = (y[inside] - y[last]) / (x[inside] - x[last])
        at_limit = y[last] + slope * (limit - x[last])
        area += 0.5 * float(y[last] + at_limit) * float(limit - x[last])
    value = min(area / limit, 1.0)
    if r.exact:
        return Metric(value)
    # Inside a bin the true curve may run anywhere in its rectangle, so off the chord by half of it
    # (by all of it in the bin the limit cuts).
    width = np.minimum(r.level / r.negatives, limit) - np.minimum(r.above / r.negatives, limit)
    halves = np.where(r.level / r.negatives > limit, 1.0, 0.5)
    return Metric(value, error=float(np.sum(halves * r.weight * width)) / limit)


def average_precision_of(r: Ranking) -> Metric:
    """Sum over thresholds of (recall step) * precision: the step-wise area, as in scikit-learn."""
    if reason := r.missing():
        # Precision needs no negatives: without any, every threshold is right.
        return Metric(1.0) if r.total_positives and not r.negatives else Metric(None, reason)
    tp = np.cumsum(r.positives)
    share = r.positives / r.total_positives
    value = float(np.dot(share, tp / (tp + r.level)))
    if r.exact:
        return Metric(value)
    first = tp - r.positives + 1  # the first positive of the bin, behind all of the bin's negatives
    worst = float(np.dot(share, first / (first + r.level)))
    best = float(np.dot(share, tp / (tp + r.above)))
    return Metric(value, error=max(best - value, value - worst))


def best_f1_of(r: Ranking) -> BestF1:
    """Highest F1 over all thresholds and the T that reaches it (`value > T` means defective)."""
    if r.total_positives == 0:
        return BestF1(Metric(None, r.missing()), None)
    tp = np.cumsum(r.positives)
    f1 = 2.0 * tp / (tp + r.level + r.total_positives)
    i = int(np.argmax(f1))
    error = 0.0
    if not r.exact:
        error = float((2.0 * tp / (tp + r.above + r.total_positives)).max() - f1[i])
    value = r.value[i]
    threshold = float(np.nextafter(value, value.dtype.type(-np.inf)))
    return BestF1(Metric(float(f1[i]), error=error), threshold)


def recall_at(r: Ranking, threshold: float) -> Metric:
    """Share of the positives with value > threshold."""
    total = r.total_positives
    if total == 0:
        return Metric(None, f"no defective {r.noun} in the test set")
    # `value` is descending, so search its negation for how many entries are > threshold.
    n = int(np.searchsorted(-r.value.astype(np.float64), -float(threshold), side="left"))
    hit = int(r.positives[:n].sum())
    straddling = 0 if r.exact or n == r.value.size else int(r.positives[n])
    return Metric(hit / total, error=straddling / total)


def rates_of(values: ArrayLike, labels: ArrayLike, threshold: float) -> Rates:
    """FPR and TPR of samples at T: share of the normal and of the defective ones with value > T."""
    s = np.asarray(values).ravel()
    y = np.asarray(labels).ravel() != 0
    require_finite(np.asarray(s, dtype=np.float64), "the scores")
    hit = s > threshold

    def share(chosen: NDArray[np.bool_], what: str) -> Metric:
        n = int(chosen.sum())
        return Metric(float(hit[chosen].sum()) / n) if n else Metric(None, f"no {what} sample")

    return Rates(share(~y, "defect-free"), share(y, "defective"))
