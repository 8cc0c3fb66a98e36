"""False alarms and misses at a threshold, and its distance to the best threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.estimate import highest_rate
from saae_runtime.thresholds import ThresholdTable

__all__ = ["NOMINAL", "Decision", "best_youden", "decide", "decisions"]

NOMINAL = (None, 0.01, 0.05)
"""False-alarm rates that are reported: the default, 1 % and 5 % of the good images."""


@dataclass(frozen=True)
class Decision:
    """Verdicts on labelled images at one image threshold.

    Attributes:
        rate: requested false-alarm rate, 0..1; None: the default.
        threshold: image threshold.
        good, false_alarms: good images, and those of them called defective.
        defective, found: defective images, and those of them called defective.
        best: the largest Youden index (share found less share of false alarms) that any threshold reaches.
    """

    rate: float | None
    threshold: float
    good: int
    false_alarms: int
    defective: int
    found: int
    best: float

    @property
    def fpr(self) -> float:
        """Share of the good images that are called defective; 0 without good images."""
        return self.false_alarms / self.good if self.good else 0.0

    @property
    def tpr(self) -> float:
        """Share of the defective images that are found; 0 without defective images."""
        return self.found / self.defective if self.defective else 0.0

    @property
    def regret(self) -> float:
        """How much lower Youden's index is than at the best threshold."""
        return self.best - (self.tpr - self.fpr)

    @property
    def fpr_limit(self) -> float:
        """Upper bound of the false-alarm rate at 95 % confidence."""
        return highest_rate(self.false_alarms, self.good) if self.good else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "fpr": self.fpr, "tpr": self.tpr, "regret": self.regret}


def best_youden(good: NDArray[np.float64], defective: NDArray[np.float64]) -> float:
    """The largest share found less share of false alarms over all thresholds (score > T is defective).

    Args:
        good, defective: image scores, each of any length above 0.
    """
    limits = np.concatenate([[-np.inf], np.unique(np.concatenate([good, defective]))])
    above_good = 1.0 - np.searchsorted(np.sort(good), limits, side="right") / good.size
    above_defective = 1.0 - np.searchsorted(np.sort(defective), limits, side="right") / defective.size
    return float((above_defective - above_good).max())


def decide(scores: Sequence[float], anomalous: Sequence[bool], threshold: float, rate: float | None = None) -> Decision:
    """Verdicts at one threshold.

    Args:
        scores: of the images.
        anomalous: whether each is defective.
        threshold: image threshold.
        rate: for the record.
    """
    values, bad = np.asarray(scores, np.float64), np.asarray(anomalous, np.bool_)
    good, defective = values[~bad], values[bad]
    best = best_youden(good, defective) if good.size and defective.size else 0.0
    return Decision(
        rate,
        threshold,
        int(good.size),
        int((good > threshold).sum()),
        int(defective.size),
        int((defective > threshold).sum()),
        best,
    )


def decisions(scores: Sequence[float], anomalous: Sequence[bool], table: ThresholdTable) -> tuple[Decision, ...]:
    """Verdicts at the rates of `NOMINAL`."""
    return tuple(decide(scores, anomalous, table.at(rate), rate) for rate in NOMINAL)
