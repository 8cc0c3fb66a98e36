"""Thresholds by acceptable false-positive rate: the quantile table of scores of normal images."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError, ConfigError, shown
from .estimate import ScoreModel

__all__ = ["DEFAULT_LEVELS", "MARGIN", "RULES", "ThresholdAccumulator", "ThresholdTable"]

DEFAULT_LEVELS: tuple[float, ...] = (
    0.0,
    *(float(f"{10 ** (step / 10):.6g}") for step in range(-70, 1)),
)
"""FPR levels of a table: 0, then ten per decade from 1e-7 to 1."""

MARGIN = 1e-3
"""Relative margin of T for FPR 0 above the largest sample, to allow for another backend's rounding."""

RULES = ("quantile", "log-normal")
"""How thresholds follow from samples."""

Samples = NDArray[np.floating] | Sequence[float] | Iterable[NDArray[np.floating]]


@dataclass(frozen=True)
class ThresholdTable:
    """Threshold T as a function of the acceptable false-positive rate (paper section 4.1.2).

    The false-positive rate of T is the share of samples from normal images with value > T. FPR 0 is the largest sample
    plus `MARGIN`.

    Attributes:
        fpr: rates in 0..1, ascending, the first one 0.
        threshold: a threshold for each rate, never increasing.
        default_fpr: the default rate.
        count: number of samples behind the table.
        rule: `quantile`, the samples' own; or `log-normal`, an estimate that holds for rates below 1/count as well
            (`saae_runtime.estimate.ScoreModel`).

    Raises:
        CalibrationError: entries that are not finite, not in order, or not of equal length.
    """

    fpr: tuple[float, ...]
    threshold: tuple[float, ...]
    default_fpr: float
    count: int
    rule: str = "quantile"

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationError(f"A threshold table is not valid: {problem}.", "", "calibrate again")

    def _problem(self) -> str:
        if not self.fpr or len(self.fpr) != len(self.threshold):
            return f"{len(self.fpr)} rates for {len(self.threshold)} thresholds"
        if not all(map(math.isfinite, (*self.fpr, *self.threshold, self.default_fpr))):
            return "it holds a NaN or an infinity"
        if self.fpr[0] != 0.0 or self.fpr[-1] > 1.0:
            return "rates must start at 0 and end at 1 or below"
        if any(a >= b for a, b in pairwise(self.fpr)):
            return "rates must ascend"
        if any(a < b for a, b in pairwise(self.threshold)):
            return "thresholds must not rise with the rate"
        if not 0.0 <= self.default_fpr <= 1.0:
            return f"the default rate {self.default_fpr} is outside 0..1"
        if self.count < 1:
            return "it rests on no samples"
        if self.rule not in RULES:
            return f"no rule is named {self.rule!r}"
        return ""

    def at(self, fpr: float | None = None) -> float:
        """The threshold for an acceptable false-positive rate.

        Returns that of the table's next lower rate, so that no more than the requested share lies above it. Without a
        model of the samples, a rate below 1/count gives the threshold for 0.

        Args:
            fpr: rate in 0..1; None for the default rate.

        Raises:
            ConfigError: a rate that is NaN or outside 0..1.
        """
        rate = self.default_fpr if fpr is None else fpr
        real = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
        if not real or not 0.0 <= rate <= 1.0:
            raise ConfigError(
                f"A false-positive rate of {shown(rate)} is not possible.",
                "It is the share of normal samples that may lie above the threshold.",
                "give a number from 0 to 1, for example 0.001",
            )
        if self.is_too_low(rate):
            return self.threshold[0]
        return self.threshold[bisect.bisect_right(self.fpr, float(rate) * (1 + 1e-9)) - 1]

    def is_too_low(self, rate: float) -> bool:
        """Whether a rate is below 1/count and nothing but the samples is known, so that the threshold for 0 applies."""
        return self.rule == "quantile" and rate * self.count < 1.0 - 1e-9

    def scaled(self, factor: float) -> ThresholdTable:
        """The table of samples that are all `factor` (above 0) times as large."""
        return dataclasses.replace(self, threshold=tuple(value * factor for value in self.threshold))

    @classmethod
    def estimated(cls, scores: Sequence[float], default_fpr: float) -> ThresholdTable:
        """The table of a few scores of normal images, by the rule `log-normal`.

        Raises:
            CalibrationError: no scores, or scores that are negative, NaN or infinite.
            ConfigError: a rate outside 0..1.
        """
        _check_rates((default_fpr,))
        model = ScoreModel.fit(scores)
        rates = sorted({0.0, float(default_fpr), *(level for level in DEFAULT_LEVELS if level >= 1e-4)})
        thresholds = np.minimum.accumulate([model.threshold(rate) for rate in rates])
        if thresholds[0] <= model.scores[-1]:
            thresholds[0] += MARGIN * abs(thresholds[0])
        return cls(tuple(rates), tuple(map(float, thresholds)), float(default_fpr), len(scores), "log-normal")

    def share_below(self, value: float) -> float:
        """The share of the table's samples below a value: 1 minus the false-positive rate of a threshold there.

        It is interpolated between the table's entries, never falls as the value rises, and is 1 from the threshold for
        FPR 0 on.

        Returns:
            A number from 0 to 1.
        """
        rates = np.asarray(self.fpr[::-1])
        thresholds = np.asarray(self.threshold[::-1])  # ascending; the last of equal ones counts
        if value >= thresholds[-1]:
            return 1.0
        above = int(np.searchsorted(thresholds, value, side="right"))
        if above == 0:
            return 0.0
        low, high = thresholds[above - 1], thresholds[above]
        rate = rates[above - 1] + (rates[above] - rates[above - 1]) * (value - low) / (high - low)
        return float(min(max(1.0 - rate, 0.0), 1.0))

    @classmethod
    def from_samples(
        cls,
        values: Samples,
        default_fpr: float,
        levels: Sequence[float] = DEFAULT_LEVELS,
    ) -> ThresholdTable:
        """Quantile table of samples from normal images.

        Args:
            values: numbers, an array of any shape, or an iterable of arrays (read one at a time, so that the maps
                of a large calibration set need not fit into memory; see `ThresholdAccumulator`).
            default_fpr: the default rate; it becomes an exact entry of the table.
            levels: rates to tabulate; those below 1/count are dropped, 0 and 1/count are always included.

        Raises:
            CalibrationError: no samples, or samples that are NaN or infinite.
            ConfigError: a rate outside 0..1.
        """
        accumulator = ThresholdAccumulator()
        if isinstance(values, np.ndarray):
            accumulator.add(values)
        elif isinstance(values, Sequence) and not any(isinstance(item, np.ndarray) for item in values):
            accumulator.add(np.asarray(values, dtype=np.float64))
        else:
            for part in values:
                accumulator.add(np.asarray(part))
        return accumulator.table(default_fpr, levels)


class ThresholdAccumulator:
    """Collects samples in bounded memory for a quantile table.

    The largest `keep` samples are kept, so every rate up to keep/count is exact: with the default and 200 maps of
    1024 x 1024 pixels every rate up to 2 %. Lower samples are counted in 2^20 intervals of relative width 2^-11. A
    threshold from there is the upper end of its interval, at most 0.05 % too high and never too low, so that its
    false-positive rate stays at or below the requested one.

    Args:
        keep: number of largest samples kept exactly (8 bytes each; twice that while adding).
    """

    def __init__(self, keep: int = 1 << 22) -> None:
        if keep < 1:
            raise ConfigError(f"keep={keep} is not possible.", "At least the largest sample is needed.", "keep >= 1")
        self._keep = keep
        self._top: NDArray[np.float64] = np.empty(0, np.float64)
        self._floor = -math.inf  # once `_top` is full, lower samples are only counted
        self._below: NDArray[np.int64] | None = None
        self.count = 0

    def add(self, values: NDArray[np.floating]) -> None:
        """Add samples of any shape.

        Raises:
            CalibrationError: a sample that is NaN or infinite.
        """
        flat = np.asarray(values).reshape(-1)
        for start in range(0, flat.size, 1 << 20):  # bounds the copies made below
            self._add(flat[start : start + (1 << 20)])

    def _add(self, chunk: NDArray[np.floating]) -> None:
        part = chunk.astype(np.float64)
        if not np.isfinite(part).all():
            raise CalibrationError(
                "A score of a normal image is NaN or infinite.",
                "The model or its weights are damaged, or an FP16 graph overflows.",
                "fit again, or look for the first bad node with saae-export verify",
            )
        self.count += part.size
        entering = part > self._floor
        self._count_below(part[~entering])
        self._top = np.concatenate([self._top, part[entering]])
        excess = self._top.size - self._keep
        if excess > 0:
            ordered = np.partition(self._top, excess)
            self._count_below(ordered[:excess])
            self._top = ordered[excess:]
            self._floor = float(self._top[0])  # np.partition puts the smallest kept one first

    def _count_below(self, values: NDArray[np.float64]) -> None:
        if not values.size:
            return
        if self._below is None:
            self._below = np.zeros(1 << 20, np.int64)
        self._below += np.bincount(_interval(values), minlength=1 << 20)

    def table(self, default_fpr: float, levels: Sequence[float] = DEFAULT_LEVELS) -> ThresholdTable:
        """The quantile table of all samples so far; see `ThresholdTable.from_samples`.

        Raises:
            CalibrationError: nothing was added.
            ConfigError: a rate outside 0..1.
        """
        if self.count == 0:
            raise CalibrationError(
                "Thresholds need at least one sample.",
                "No normal image was left for calibration.",
                "give more normal images, or a smaller held-out share",
            )
        _check_rates((default_fpr, *levels))
        smallest = 1.0 / self.count
        rates = sorted({0.0, smallest, float(default_fpr), *(float(x) for x in levels if x > smallest)})
        top = np.sort(self._top)[::-1]
        at_or_above = None
        if self._below is not None:
            at_or_above = top.size + np.cumsum(self._below[::-1])[::-1]
        found = [self._quantile(rate, top, at_or_above) for rate in rates]
        # The intervals' upper ends can exceed the smallest kept sample; a table never rises.
        thresholds = np.minimum.accumulate(found)
        thresholds[0] += MARGIN * abs(thresholds[0])
        return ThresholdTable(tuple(rates), tuple(float(x) for x in thresholds), float(default_fpr), self.count)

    def _quantile(self, rate: float, top: NDArray[np.float64], at_or_above: NDArray[np.int64] | None) -> float:
        """The smallest sample with at most rate * count samples above it."""
        above = min(math.floor(rate * self.count + 1e-9), self.count - 1)
        if above < top.size:
            return float(top[above])
        assert at_or_above is not None  # count > top.size only after a sample was displaced
        # The interval that holds the sample of rank `above`: the highest one with more than `above` samples from it up.
        index = int(np.searchsorted(-at_or_above, -above, side="left")) - 1
        return _upper_end(index)


def _check_rates(rates: Sequence[float]) -> None:
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise ConfigError(f"A false-positive rate of {rate} is not possible.", "", "give rates from 0 to 1")


def _interval(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of each value's interval: the leading 20 bits of the float32 above it, in the order of the numbers."""
    narrow = values.astype(np.float32) + np.float32(0.0)  # no negative zero
    narrow = np.where(narrow < values, np.nextafter(narrow, np.float32(np.inf)), narrow)
    bits = narrow.view(np.uint32)
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(12)).astype(np.int64)


def _upper_end(index: int) -> float:
    """The largest float32 of an interval."""
    ordered = (index << 12) | 0xFFF
    bits = ordered & 0x7FFFFFFF if ordered >> 31 else ~ordered & 0xFFFFFFFF
    value = float(np.uint32(bits).view(np.float32))
    return value if math.isfinite(value) else float(np.finfo(np.float32).max)
