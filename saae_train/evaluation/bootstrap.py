"""Bootstrap intervals over images, from per-image histograms instead of recomputed rankings.

Images are resampled, not pixels: with replacement, defective
and defect-free ones apart (a replicate always holds both). A replicate's histogram is a weighted sum of
the images' histograms, one matrix product for all replicates. The binned metric differs slightly
from the exact one; every replicate is shifted by that difference before the percentiles are taken.

Where all replicates agree, because all images do, there is no interval: what did not vary among the images at hand
would be stated without any doubt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pixel_pool import PixelPool

__all__ = [
    "PixelIntervals",
    "multiplicities",
    "pixel_intervals",
    "ranked_intervals",
    "score_intervals",
    "share_interval",
]

Interval = tuple[float, float]
Array = NDArray[np.float64]


class PixelIntervals(NamedTuple):
    """Intervals of the pixel metrics, None where fewer than two images could be resampled, or all replicates agree."""

    roc_auc: Interval | None
    pro_auc: Interval | None
    average_precision: Interval | None
    best_f1: Interval | None


def multiplicities(strata: NDArray[np.bool_], replicates: int, seed: int) -> Array:
    """How often each image is drawn, within its stratum: replicates x images."""
    rng = np.random.default_rng(seed)
    out = np.zeros((replicates, strata.size))
    for stratum in (False, True):
        index = np.flatnonzero(strata == stratum)
        if index.size:
            out[:, index] = rng.multinomial(index.size, np.full(index.size, 1 / index.size), replicates)
    return out


def pixel_intervals(
    pool: PixelPool,
    groups: set[str] | None = None,
    *,
    exact: dict[str, float] | None = None,
    limit: float = 0.3,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> PixelIntervals:
    """Intervals for the pixels of `groups` (all by default).

    `exact` holds the exact metrics by the field names of PixelIntervals; replicates are shifted to them.
    """
    p = pool.profiles()
    chosen = np.array([groups is None or g in groups for g in p.groups], dtype=bool)
    negative, positive, weight, regions = (a[chosen] for a in (p.negative, p.positive, p.weight, p.regions))
    defective = positive.sum(axis=1) > 0
    if defective.sum() < 2 or negative.sum() == 0:
        return PixelIntervals(None, None, None, None)
    draws = multiplicities(defective, replicates, seed)
    draws = np.concatenate([np.ones((1, draws.shape[1])), draws])  # row 0: the sample itself
    # High values first, so that cumulative sums walk the threshold down.
    fp = _walk(draws @ negative[:, ::-1])
    tp = _walk(draws @ positive[:, ::-1])
    overlap = _walk(draws @ weight[:, ::-1]) / np.maximum(draws @ regions, 1)[:, None]
    usable = fp[:, -1] > 0
    fp, tp, overlap = fp[usable], tp[usable], overlap[usable]
    x, recall = fp / fp[:, -1:], tp / tp[:, -1:]
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(tp / (tp + fp), nan=1.0)
    binned = {
        "roc_auc": _area(x, recall, 1.0),
        "pro_auc": _area(x, overlap, limit) / limit,
        "average_precision": (np.diff(recall, axis=1) * precision[:, 1:]).sum(axis=1),
        "best_f1": (2 * tp / (tp + fp + tp[:, -1:])).max(axis=1),
    }
    return PixelIntervals(
        **{name: _percentiles(values, (exact or {}).get(name), level) for name, values in binned.items()}
    )


def score_intervals(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Interval of the image-level ROC-AUC of n scores and n labels; exact in every replicate."""
    s, y = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels).ravel() != 0
    if y.sum() < 2 or (~y).sum() < 2:
        return None
    wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
    draws = multiplicities(y, replicates, seed)
    values = ((draws[:, y] @ wins) * draws[:, ~y]).sum(axis=1) / wins.size
    return _percentiles(np.concatenate([[wins.mean()], values]), None, level)


def share_interval(
    hits: ArrayLike,
    totals: ArrayLike,
    strata: ArrayLike,
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Interval of sum(hits) / sum(totals) over images, such as the rate of pixels above T.

    hits, totals: n counts, one per image. strata: n flags, whether it is defective; drawn separately. None if fewer
    than two images have a total above 0, or all replicates agree. Of images themselves, see `share.Share`.
    """
    h, t = np.asarray(hits, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    kept = t > 0
    if kept.sum() < 2:
        return None
    h, t = h[kept], t[kept]
    draws = multiplicities(np.asarray(strata, dtype=bool)[kept], replicates, seed)
    return _percentiles(np.concatenate([[h.sum() / t.sum()], (draws @ h) / (draws @ t)]), None, level)


def ranked_intervals(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> tuple[Interval | None, Interval | None]:
    """Intervals of average precision and best F1 of n scores and n labels; exact in every replicate."""
    s, y = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels).ravel() != 0
    if y.sum() < 2 or (~y).sum() < 2:
        return None, None
    values, place = np.unique(-s, return_inverse=True)  # highest first, ties together
    draws = np.concatenate([np.ones((1, s.size)), multiplicities(y, replicates, seed)])
    level_of = np.eye(values.size)[place]
    positive, negative = (draws * y) @ level_of, (draws * ~y) @ level_of
    tp, fp = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    total = tp[:, -1:]
    precision = np.divide(tp, tp + fp, out=np.ones_like(tp), where=tp + fp > 0)
    area = (positive / total * precision).sum(axis=1)
    best = (2 * tp / (tp + fp + total)).max(axis=1)
    return _percentiles(area, None, level), _percentiles(best, None, level)


def _walk(histogram: Array) -> Array:
    """Cumulative sums along the last axis, with a leading 0."""
    return np.concatenate([np.zeros((histogram.shape[0], 1)), np.cumsum(histogram, axis=1)], axis=1)


def _area(x: Array, y: Array, limit: float) -> Array:
    """Row-wise trapezoid area under (x, y) for x up to limit, interpolated linearly there."""
    x0, x1, y0, y1 = x[:, :-1], np.minimum(x[:, 1:], limit), y[:, :-1], y[:, 1:]
    step = np.diff(x, axis=1)
    inside = np.clip((limit - x0) / np.where(step > 0, step, 1.0), 0.0, 1.0)
    end = y0 + (y1 - y0) * inside
    return (0.5 * (y0 + end) * np.maximum(x1 - x0, 0.0)).sum(axis=1)


def _percentiles(values: Array, exact: float | None, level: float) -> Interval | None:
    """The interval of row 0 from the replicates that follow; None where they agree, up to rounding."""
    if np.ptp(values[1:]) < 1e-12:
        return None
    shift = 0.0 if exact is None else exact - values[0]
    tail = (1 - level) / 2
    low, high = np.clip(np.quantile(values[1:], [tail, 1 - tail]) + shift, 0.0, 1.0)
    return float(low), float(high)
