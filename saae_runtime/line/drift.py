"""Drift: compares the scores of the latest parts with those of the bundle's good parts."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..thresholds import ThresholdTable
from .config import HealthConfig
from .part import Part

__all__ = ["DriftMonitor", "Limits", "limits_for"]

_MARKS = (0.5, 0.1)
"""The scores of a window are compared with the scores that 50 % and 10 % of the good parts exceed."""

_OWN = 5  # windows that make up a table if the bundle's cannot be used
_DOUBT = 0.01  # share of calibrations whose limits may be too narrow by chance
_GRID = 2000  # points of a distribution


@dataclass(frozen=True)
class Limits:
    """Limits of what chance explains in a window.

    Attributes:
        mark: a score.
        rate: share of good parts above it, by the table.
        low, high: limits of the number of a window's parts above it; outside is an alarm. If `low` is -1 or `high`
            above the window, there is no alarm on that side.
    """

    mark: float
    rate: float
    low: int
    high: int


def limits_for(table: ThresholdTable, window: int, false_alarms: float, defects: float = 0.0) -> tuple[Limits, ...]:
    """The limits for windows of good parts and a share of defective ones.

    The share of good parts above a mark is estimated from `table.count` images. The limits allow for the confidence
    interval of this share: 99 of 100 calibrations with that many images keep `false_alarms`, for any distribution of
    scores. Fewer images give wider limits.

    Args:
        table: image scores of good parts.
        window: number of parts.
        false_alarms: share of windows without drift that may be outside any limit. It is divided among three tails:
            too many above the upper mark, too many and too few above the middle one.
        defects: share of parts that may be defective, which lie above every mark.

    Returns:
        The limits of the middle and the upper mark; fewer if the table has no entry near them, because it is made from
        only a few images.
    """
    share, doubt = false_alarms / 3.0, _DOUBT / 3.0
    found = []
    for place, wanted in enumerate(_MARKS):
        near = [
            (abs(math.log(rate / wanted)), rate, mark)
            for rate, mark in zip(table.fpr, table.threshold, strict=True)
            if wanted / 1.6 <= rate <= wanted * 1.6
        ]
        if not near:
            continue
        _, rate, mark = min(near)
        least, most = _possible(rate, table.count, doubt)
        high = _most(window, most + defects * (1.0 - most), share)
        low = _fewest(window, least, share) if place == 0 else -1
        found.append(Limits(mark, rate, low, high))
    return tuple(found)


def _possible(rate: float, count: int, doubt: float) -> tuple[float, float]:
    """Confidence limits of the share of good parts above a mark, which `count` images estimate as `rate`.

    Each is exceeded once in 1 / `doubt` calibrations (Clopper and Pearson).
    """
    above = min(max(math.ceil(rate * count), 1), count - 1)  # rounded up for one limit, down for the other
    below = min(max(math.floor(rate * count), 1), count - 1)
    return _beta_quantile(below, count - below + 1, doubt), _beta_quantile(above + 1, count - above, 1.0 - doubt)


def _beta_quantile(a: float, b: float, share: float) -> float:
    """Quantile of the Beta distribution, on a grid."""
    mean, spread = a / (a + b), math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1.0)))
    low, high = max(mean - 9 * spread, 1e-9), min(mean + 9 * spread, 1.0 - 1e-9)
    rates = low + (np.arange(_GRID) + 0.5) * (high - low) / _GRID
    logs = (a - 1.0) * np.log(rates) + (b - 1.0) * np.log1p(-rates)
    weights = np.exp(logs - logs.max())
    return float(rates[min(int(np.searchsorted(np.cumsum(weights), share * weights.sum())), _GRID - 1)])


def _chances(window: int, rate: float) -> NDArray[np.float64]:
    """Probability of each number 0..window of parts above a mark, if the share above it is `rate`."""
    numbers = np.arange(window + 1)
    ways = np.array([math.lgamma(window + 1) - math.lgamma(k + 1) - math.lgamma(window - k + 1) for k in numbers])
    return np.asarray(np.exp(ways + numbers * math.log(rate) + (window - numbers) * math.log1p(-rate)))


def _most(window: int, rate: float, share: float) -> int:
    """Largest number above the mark whose tail is not rarer than `share`."""
    tail = np.cumsum(_chances(window, rate)[::-1])[::-1]  # of this many or more
    rare = np.flatnonzero(tail <= share)
    return int(rare[0]) - 1 if rare.size else window + 1


def _fewest(window: int, rate: float, share: float) -> int:
    """Smallest number above the mark whose tail is not rarer than `share`."""
    tail = np.cumsum(_chances(window, rate))  # of this many or fewer
    rare = np.flatnonzero(tail <= share)
    return int(rare[-1]) + 1 if rare.size else -1


@dataclass(eq=False)
class _Watched:
    """The scores of one station and recipe."""

    limits: tuple[Limits, ...] | None
    rests_on: str
    window: deque[float]
    own: list[float] = field(default_factory=list)
    alarm: bool = False
    words: str = ""
    alarms: int = 0


class DriftMonitor:
    """Compares the latest scores of each station and recipe with those of good parts. Thread-safe.

    The reference is the bundle's table. With masks, which lower the scores, it is the first five windows of parts since
    the start.

    Args:
        config: `[health]` of line.toml.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._bundles: dict[tuple[str, str], tuple[str, bool]] = {}

    def take(self, part: Part, table: ThresholdTable) -> str | None:
        """Add a part; parts without a score are ignored.

        Args:
            part: its record.
            table: image scores of its bundle's good parts.

        Returns:
            Text that an alarm begins or ends; None if nothing changes.
        """
        if part.score is None or part.recipe is None or part.bundle is None:
            return None
        with self._lock:
            return self._take(part.station, part.recipe, part.bundle, part.masks is not None, part.score, table)

    def _take(
        self, station: str, recipe: str, bundle: str, masked: bool, score: float, table: ThresholdTable
    ) -> str | None:
        key, is_now = (station, recipe), (bundle, masked)
        if self._bundles.get(key) != is_now:
            self._bundles[key] = is_now
            limits = None if masked else self._limits(table)
            rests_on = "the first parts" if masked else f"the bundle's {table.count} images"
            self._watched[key] = _Watched(limits, rests_on, deque(maxlen=self._config.drift_window))
        watched = self._watched[key]
        if watched.limits is None:
            watched.own.append(score)
            if len(watched.own) >= _OWN * self._config.drift_window:
                watched.limits = self._limits(ThresholdTable.from_samples(watched.own, 0.1))
                watched.own = []
            return None
        watched.window.append(score)
        if len(watched.window) < self._config.drift_window:
            return None
        words = self._compare(watched)
        if bool(words) == watched.alarm:
            watched.words = words
            return None
        watched.alarm, watched.words = bool(words), words
        watched.alarms += watched.alarm
        return (
            f"drift at station {station}, recipe {recipe}: {words}"
            if words
            else (f"no drift any more at station {station}, recipe {recipe}")
        )

    def _limits(self, table: ThresholdTable) -> tuple[Limits, ...]:
        config = self._config
        return limits_for(table, config.drift_window, config.drift_false_alarms, config.drift_defects)

    def _compare(self, watched: _Watched) -> str:
        """Text of what is outside its limits; empty if nothing is."""
        scores = np.asarray(watched.window)
        for limits in watched.limits or ():
            above = int((scores > limits.mark).sum())
            if watched.alarm:  # an alarm ends only well inside the limits
                expected = limits.rate * scores.size
                high, low = (expected + limits.high) / 2, (expected + limits.low) / 2
            else:
                high, low = limits.high, limits.low
            if above > high or above < low:
                return (
                    f"{above} of the last {scores.size} scores are above {limits.mark:.4g}, "
                    f"where {limits.rate * scores.size:.0f} are expected of good parts"
                )
        return ""

    def state(self) -> list[dict[str, Any]]:
        """For each station and recipe: text of an alarm, and the share above the marks."""
        with self._lock:
            return [
                {
                    "station": station,
                    "recipe": recipe,
                    "alarm": watched.alarm,
                    "alarms": watched.alarms,
                    "words": watched.words,
                    "window": len(watched.window),
                    "rests_on": watched.rests_on,
                    "marks": [
                        {
                            "score": limits.mark,
                            "expected": limits.rate,
                            "found": float((np.asarray(watched.window) > limits.mark).mean())
                            if watched.window
                            else None,
                            "alarm_below": limits.low / self._config.drift_window,
                            "alarm_above": limits.high / self._config.drift_window,
                        }
                        for limits in watched.limits or ()
                    ],
                }
                for (station, recipe), watched in self._watched.items()
            ]
