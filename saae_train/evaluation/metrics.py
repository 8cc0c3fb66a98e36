"""Metrics of anomaly segmentation, exact on all pixels at the images' own resolution.

The functions here take lists of maps H x W and masks H x W (nonzero = defect, None = no defect), each pair of its own
size, or n scores and n labels, and return `Metric`s: a fraction, or None with its reason. Several pixel metrics of the
same maps share one sort through `pixel_metrics` or a `PixelPool`.

    pixel ROC-AUC, average precision, best F1   as scikit-learn defines them
    PRO-AUC                                     paper section 4.1.3, regions by 8-connectivity,
                                                normalised at 30 % FPR (see ranking.pro_auc_of)

Example:
    >>> import numpy as np
    >>> maps = [np.array([[0.1, 0.2], [0.9, 0.3]], np.float32)]
    >>> masks = [np.array([[0, 0], [1, 0]], bool)]
    >>> float(pixel_roc_auc(maps, masks)), float(pro_auc(maps, masks))
    (1.0, 1.0)
    >>> roc_auc([0.2, 0.4], [0, 0]).reason
    'no defective image in the test set'
"""

from __future__ import annotations

from collections.abc import Iterable

from numpy.typing import ArrayLike

from .bootstrap import pixel_intervals
from .pixel_pool import PixelPool
from .ranking import (
    BestF1,
    Metric,
    Ranking,
    Rates,
    average_precision_of,
    best_f1_of,
    pro_auc_of,
    rates_of,
    roc_auc_of,
)

__all__ = [
    "BestF1",
    "Metric",
    "PixelPool",
    "Ranking",
    "Rates",
    "average_precision",
    "best_f1",
    "pixel_metrics",
    "pixel_roc_auc",
    "pool_metrics",
    "pro_auc",
    "rates",
    "roc_auc",
]

Maps = Iterable[ArrayLike]
Masks = Iterable[ArrayLike | None]

PRO_LIMIT = 0.3


def pixel_roc_auc(maps: Maps, masks: Masks) -> Metric:
    """ROC-AUC over all pixels of all images; ties count one half."""
    return roc_auc_of(PixelPool.of(maps, masks).ranking())


def pro_auc(maps: Maps, masks: Masks, limit: float = PRO_LIMIT) -> Metric:
    """Area under the per-region-overlap curve up to FPR = limit, divided by limit."""
    return pro_auc_of(PixelPool.of(maps, masks).ranking(), limit)


def pixel_metrics(maps: Maps, masks: Masks, *, limit: float = PRO_LIMIT, intervals: bool = False) -> dict[str, Metric]:
    """Pixel ROC-AUC, PRO-AUC, average precision and best F1 from one sort."""
    return pool_metrics(PixelPool.of(maps, masks), limit=limit, intervals=intervals)


def pool_metrics(
    pool: PixelPool,
    groups: Iterable[str] | None = None,
    *,
    limit: float = PRO_LIMIT,
    intervals: bool = False,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Metric]:
    """The metrics of `pixel_metrics` over the pixels of some groups of a pool (all by default).

    With `intervals`, each carries its 95 % bootstrap interval over images.
    """
    chosen = None if groups is None else set(groups)
    r = pool.ranking(chosen)
    found = {
        "roc_auc": roc_auc_of(r),
        "pro_auc": pro_auc_of(r, limit),
        "average_precision": average_precision_of(r),
        "best_f1": best_f1_of(r).f1,
    }
    if intervals and not r.missing():
        exact = {name: float(m) for name, m in found.items() if m.value is not None}
        bounds = pixel_intervals(pool, chosen, exact=exact, limit=limit, replicates=replicates, seed=seed)
        for name, interval in bounds._asdict().items():
            if interval is not None and found[name].value is not None:
                found[name] = found[name].with_interval(*interval)
    return {name if name == "pro_auc" else f"pixel_{name}": m for name, m in found.items()}


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> Metric:
    """ROC-AUC of n scores and n labels (nonzero = defective); ties count one half."""
    return roc_auc_of(Ranking.from_scores(scores, labels))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> Metric:
    """Average precision of n scores and n labels."""
    return average_precision_of(Ranking.from_scores(scores, labels))


def best_f1(scores: ArrayLike, labels: ArrayLike) -> BestF1:
    """Highest F1 over all thresholds, and the T that reaches it (`score > T`)."""
    return best_f1_of(Ranking.from_scores(scores, labels))


def rates(scores: ArrayLike, labels: ArrayLike, threshold: float) -> Rates:
    """FPR and TPR of n scores and n labels at T (`score > T`)."""
    return rates_of(scores, labels, threshold)
