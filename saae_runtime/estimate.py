"""Estimates the image threshold for any false-alarm rate from the scores of a few good images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

__all__ = ["DEFAULT_FALSE_ALARMS", "LEAST_RATE", "ScoreModel", "chance_of_alarms", "highest_rate"]

DEFAULT_FALSE_ALARMS = 0.05
"""Default share of good images called defective: one in twenty. At lower rates, products whose good parts vary much
lose too many detections (docs/quality.md)."""

LEAST_RATE = 1e-4
"""The lowest rate to which the distribution of the scores is extrapolated; lower ones have its threshold."""

_TRIM = 0.05
_TRIM_ONE_FROM = 8  # fewest images with which a wrong one does not matter
_FITS = 0.05  # level of the test whether the line is too low

_NORMAL = NormalDist()


@dataclass(frozen=True)
class ScoreModel:
    """Scores of good images as a log-normal distribution, robust against a few that are not good.

    The logarithms' normal quantile plot is a straight line whose middle (without the smallest and largest 5 % of the
    points, and without one of each from eight images on) gives centre and spread. A threshold is the prediction bound
    for one more image, with Student's t. If more of the given images lie above it than the rate explains (a binomial
    test at 5 %), the tail is heavier than the line, and the scores' own quantile is used.

    Attributes:
        scores: of the good images, ascending.
        centre, spread: of the logarithms.
    """

    scores: tuple[float, ...]
    centre: float
    spread: float

    @classmethod
    def fit(cls, scores: Sequence[float]) -> ScoreModel:
        """Raise CalibrationError: no scores, or one that is not finite, or negative."""
        values = np.sort(np.asarray(scores, np.float64))
        if not values.size:
            raise CalibrationError("An image threshold needs at least one score.", "", "give more normal images")
        if not np.isfinite(values).all() or values[0] < 0.0:
            raise CalibrationError(
                "A score of a normal image is negative, NaN or infinite.",
                "The model or its weights are damaged, or an FP16 graph overflows.",
                "fit again, or look for the first bad node with saae-export verify",
            )
        logs = np.log(np.maximum(values, 1e-12))
        centre, spread = _line(logs)
        return cls(tuple(values.tolist()), centre, spread)

    def threshold(self, rate: float) -> float:
        """The score that a share `rate` (0..1) of further good images exceeds.

        0 is the paper's choice, just above the largest score (section 4.1.2), or the line's value for one image in ten
        thousand, if that is higher.
        """
        if rate >= 1.0:
            return 0.0
        if rate <= 0.0:
            return max(self.scores[-1], self.bound(LEAST_RATE))
        allowed = _explained(len(self.scores), rate)
        own = self.scores[-1 - allowed] if allowed < len(self.scores) else 0.0
        return max(self.bound(max(rate, LEAST_RATE)), own)

    def rate(self, threshold: float) -> float:
        """The share of further good images that exceeds a threshold: the inverse of `threshold`, 0..1."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.threshold(middle) > threshold else (low, middle)
        return high

    def leverage(self, rate: float) -> NDArray[np.float64]:
        """Relative fall of the threshold of `rate` without each image, in the order of `scores`."""
        full = self.threshold(rate)
        if len(self.scores) < 2:
            return np.zeros(len(self.scores))
        without = [
            ScoreModel.fit(self.scores[:place] + self.scores[place + 1 :]).threshold(rate)
            for place in range(len(self.scores))
        ]
        return 1.0 - np.asarray(without) / max(full, 1e-12)

    def bound(self, rate: float) -> float:
        """The line's threshold for a rate above 0, without the check of the tail."""
        count = len(self.scores)
        quantile = _NORMAL.inv_cdf(1.0 - rate) if count < 2 else _t_quantile(1.0 - rate, count - 1)
        return math.exp(min(self.centre + quantile * math.sqrt(1.0 + 1.0 / count) * self.spread, 80.0))


def chance_of_alarms(alarms: int, good: int, above: int, count: int) -> float:
    """The probability that `alarms` or more of `good` new images exceed a threshold that `above` of `count` exceeded.

    All images are alike. The threshold is an estimate itself, so its rate is not known: above the largest of 30 images
    lies, on average, one in 31. (Beta-binomial: how many new values exceed an order statistic.)

    Args:
        alarms, good: of the new images.
        above, count: of the images that the threshold follows from; `above` is less than `count`.

    Returns:
        0..1.
    """
    if above >= count:
        return 1.0
    every = _log_choose(good + count, count)
    return min(
        1.0,
        math.fsum(
            math.exp(_log_choose(k + above, k) + _log_choose(good - k + count - above - 1, good - k) - every)
            for k in range(max(alarms, 0), good + 1)
        ),
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def highest_rate(above: int, count: int, confidence: float = 0.95) -> float:
    """Upper confidence bound of the false-alarm rate from `above` of `count` images (Clopper and Pearson, one-sided).

    Args:
        above: good images above the threshold.
        count: good images in all.
        confidence: 0..1.
    """
    if above >= count:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _binomial(above, count, middle) > 1.0 - confidence else (low, middle)
    return high


def _line(logs: NDArray[np.float64]) -> tuple[float, float]:
    """Intercept and slope of the middle of the normal quantile plot (Blom's plotting positions); logs ascend."""
    count = logs.size
    trim = max(int(_TRIM * count), int(count >= _TRIM_ONE_FROM))
    places = np.array([_NORMAL.inv_cdf((rank - 0.375) / (count + 0.25)) for rank in range(1, count + 1)])
    x, y = places[trim : count - trim], logs[trim : count - trim]
    if x.size < 2:
        return float(y.mean()), 0.0
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return float(y.mean() - slope * x.mean()), slope


def _t_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else Abramowitz and Stegun 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2.0 * share - 1.0) * math.sqrt(2.0 / (4.0 * share * (1.0 - share)))
    x = _NORMAL.inv_cdf(share)
    terms = (
        (x**3 + x) / 4.0,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96.0,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384.0,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160.0,
    )
    return x + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _explained(count: int, rate: float) -> int:
    """Largest number of `count` images above the threshold of `rate` that chance explains."""
    above = math.floor(rate * count)
    while above < count and 1.0 - _binomial(above, count, rate) > _FITS:
        above += 1
    return above


def _binomial(above: int, count: int, rate: float) -> float:
    """Probability of at most `above` of `count` at `rate`."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return float(above >= count)
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    whole = math.lgamma(count + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * log_rate + (count - k) * log_rest)
            for k in range(above + 1)
        ),
    )
