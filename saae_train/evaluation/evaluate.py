"""Scores a category's test images and measures the result, overall and by defect type.

Everything is measured at the images' own resolution. A map of a different size is first resized to its image's, by the
runtime's upsampling. Images are read, scored and pooled one by one, so memory holds the pool (4 bytes a pixel,
bounded; see pixel_pool.py) and never a list of maps. A metric that cannot be measured has a reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import DataError
from saae_runtime.geometry import upsample_map
from saae_runtime.progress import Progress, silent
from saae_runtime.result import Scorer

from ..data.category import GOOD, Category, Sample
from .bootstrap import ranked_intervals, score_intervals, share_interval
from .curves import curves
from .metrics import PRO_LIMIT, pool_metrics
from .pixel_pool import EXACT_PIXELS, PixelPool
from .ranking import Metric, Ranking, average_precision_of, best_f1_of, rates_of, roc_auc_of
from .result import Evaluation, ImageScore, Subset
from .share import Share

__all__ = ["evaluate"]


def evaluate(
    scorer: Scorer,
    category: Category,
    *,
    threshold: float | None = None,
    image_threshold: float | None = None,
    limit: float = PRO_LIMIT,
    intervals: bool = True,
    exact_pixels: int = EXACT_PIXELS,
    progress: Progress = silent,
) -> Evaluation:
    """Score the test images and measure everything (paper section 4.1.3 and more; see metrics.py).

    Args:
        scorer: scores one frame.
        category: its test images; masks are read from the samples.
        threshold: pixel T, image_threshold: image T. A score above T means defective. None: no rates at T.
        limit: FPR up to which PRO counts.
        intervals: add 95 % intervals: Wilson's of the image rates, else bootstrap intervals over images.
        exact_pixels: pixels kept exactly; with more, values are binned and the error bound is stated.
        progress: called with (done, total).

    Raises:
        DataError: no test image; a mask of a different size; a score or map that is not finite (the image is named).
    """
    if not category.test:
        raise DataError(
            f"Category {category.name!r} has no test image.",
            "There is nothing to evaluate on.",
            "add images under test/good and test/<defect type>",
        )
    scored = _score_images(scorer, category.test, _ScoredImages(PixelPool(exact_pixels), threshold), progress)
    how = _Measures(threshold, image_threshold, limit, intervals)
    rows, ranking = scored.rows, scored.pool.ranking()
    types = sorted({row.label for row in rows if row.is_anomalous})
    return Evaluation(
        category=category.name,
        synthetic=category.synthetic,
        overall=_measure(scored, "overall", rows, None, how),
        by_type=tuple(
            _measure(scored, name, [r for r in rows if r.label == name or not r.is_anomalous], {name, GOOD}, how)
            for name in types
        ),
        images=tuple(rows),
        curves=tuple(curves(ranking, limit) + curves(_image_ranking(rows))),
        threshold=threshold,
        image_threshold=image_threshold,
        best_f1_threshold=best_f1_of(ranking).threshold,
        pro_limit=limit,
        exact=scored.pool.exact,
        notes=tuple(_notes(scored)),
    )


@dataclass
class _ScoredImages:
    """What is kept of the scored images: pixels, one row per image, and counts above T."""

    pool: PixelPool
    threshold: float | None
    rows: list[ImageScore] = field(default_factory=list)
    counts: list[_Counts] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    empty_mask: list[str] = field(default_factory=list)

    def add_pixels(self, full: NDArray[np.float32], sample: Sample, label: str) -> None:
        """Add a map at its image's size, unless the image is defective and has no mask."""
        if sample.is_anomalous and sample.mask is None:
            self.without_mask.append(str(sample.path))
            return
        mask = sample.truth() if sample.is_anomalous else None
        if mask is not None and not mask.any():
            self.empty_mask.append(str(sample.mask))
        self.pool.add(full, mask, label, str(sample.path))
        if self.threshold is not None:
            self.counts.append(_Counts.of(full, mask, label, self.threshold))


@dataclass(frozen=True)
class _Measures:
    """What to measure, see `evaluate`."""

    threshold: float | None
    image_threshold: float | None
    limit: float
    intervals: bool


def _score_images(
    scorer: Scorer, samples: Sequence[Sample], scored: _ScoredImages, progress: Progress
) -> _ScoredImages:
    for done, sample in enumerate(samples, start=1):
        frame = sample.read()
        start = time.perf_counter()
        found = scorer(frame)
        seconds = time.perf_counter() - start
        if not np.isfinite(found.score):
            raise DataError(
                f"{sample.path}: the score is {found.score}.",
                "A score that is not finite cannot be ranked.",
                "look for NaN weights or an FP16 overflow in the model",
            )
        label = sample.label if sample.is_anomalous else GOOD
        height, width = frame.shape[:2]
        scored.add_pixels(upsample_map(found.anomaly_map, (height, width)), sample, label)
        peak = float(found.anomaly_map.max())
        scored.rows.append(
            ImageScore(str(sample.path), (height, width), label, sample.is_anomalous, found.score, peak, seconds)
        )
        progress(done, len(samples))
    return scored


def _measure(
    scored: _ScoredImages, name: str, rows: list[ImageScore], groups: set[str] | None, how: _Measures
) -> Subset:
    """The metrics of some rows; `groups` are their labels, None for all."""
    found = pool_metrics(scored.pool, groups, limit=how.limit, intervals=how.intervals)
    if how.threshold is not None:
        found.update(_pixel_rates(scored.pool, how.threshold, groups, scored.counts, how.intervals))
    unmasked = set(scored.without_mask)
    if any(row.file in unmasked for row in rows) and scored.pool.ranking(groups).total_positives == 0:
        # Without masks it is unknown which pixels are defective; the good images still have an FPR.
        reason = "the defective images have no ground-truth masks"
        found = {key: metric if key.startswith("pixel_fpr") else Metric(None, reason) for key, metric in found.items()}
    found.update(_image_metrics(rows, how.intervals))
    if how.image_threshold is not None:
        found.update(_image_rates(rows, how.image_threshold, how.intervals))
    return Subset(name, len(rows), sum(row.is_anomalous for row in rows), found)


def _image_ranking(rows: list[ImageScore]) -> Ranking:
    return Ranking.from_scores([r.score for r in rows], [r.is_anomalous for r in rows])


def _image_metrics(rows: list[ImageScore], intervals: bool) -> dict[str, Metric]:
    ranking = _image_ranking(rows)
    area, precision, f1 = roc_auc_of(ranking), average_precision_of(ranking), best_f1_of(ranking).f1
    if intervals:
        scores, labels = [r.score for r in rows], [r.is_anomalous for r in rows]
        area = _with(area, score_intervals(scores, labels))
        of_precision, of_f1 = ranked_intervals(scores, labels)
        precision, f1 = _with(precision, of_precision), _with(f1, of_f1)
    return {"image_roc_auc": area, "image_average_precision": precision, "image_best_f1": f1}


def _image_rates(rows: list[ImageScore], threshold: float, intervals: bool) -> dict[str, Metric]:
    labels = np.array([r.is_anomalous for r in rows], bool)
    scores = np.array([r.score for r in rows])
    found = rates_of(scores, labels, threshold)
    fpr, tpr = found.fpr, found.tpr
    if intervals:
        hit = scores > threshold
        fpr = _with(fpr, Share(int(hit[~labels].sum()), int((~labels).sum())).interval)
        tpr = _with(tpr, Share(int(hit[labels].sum()), int(labels.sum())).interval)
    return {"image_fpr": fpr, "image_tpr": tpr}


@dataclass(frozen=True)
class _Counts:
    """Pixels of one image and how many are above T, defect-free and defective."""

    label: str
    negative: int
    false_alarms: int
    positive: int
    found: int

    @classmethod
    def of(cls, full: NDArray[np.float32], mask: NDArray[np.bool_] | None, label: str, threshold: float) -> _Counts:
        above = full > np.float64(threshold)
        if mask is None:
            return cls(label, full.size, int(above.sum()), 0, 0)
        positive, found = int(mask.sum()), int((above & mask).sum())
        return cls(label, full.size - positive, int(above.sum()) - found, positive, found)


def _pixel_rates(
    pool: PixelPool, threshold: float, groups: set[str] | None, counts: list[_Counts], intervals: bool
) -> dict[str, Metric]:
    found = pool.rates(threshold, groups)
    fpr, tpr = found.fpr, found.tpr
    kept = [c for c in counts if groups is None or c.label in groups]
    parts = {
        "pixel_fpr_good": _false_alarms([c for c in kept if c.label == GOOD], "good", intervals),
        "pixel_fpr_halo": _false_alarms([c for c in kept if c.label != GOOD], "masked defective", intervals),
    }
    if intervals:
        defective = [c.positive > 0 for c in kept]
        fpr = _with(fpr, share_interval([c.false_alarms for c in kept], [c.negative for c in kept], defective))
        tpr = _with(tpr, share_interval([c.found for c in kept], [c.positive for c in kept], defective))
    return {"pixel_fpr": fpr, "pixel_tpr": tpr, **parts}


def _false_alarms(counts: list[_Counts], kind: str, intervals: bool) -> Metric:
    """Share of the defect-free pixels of some images above T; `kind` describes the images."""
    negative = sum(c.negative for c in counts)
    if not negative:
        what = "image has a defect-free pixel" if counts else "image is in the test set"
        return Metric(None, f"no {kind} {what}")
    rate = Metric(sum(c.false_alarms for c in counts) / negative)
    if not intervals:
        return rate
    groups = [False] * len(counts)
    return _with(rate, share_interval([c.false_alarms for c in counts], [c.negative for c in counts], groups))


def _with(metric: Metric, bounds: tuple[float, float] | None) -> Metric:
    return metric if metric.value is None or bounds is None else metric.with_interval(*bounds)


def _notes(scored: _ScoredImages) -> list[str]:
    pool, without_mask, empty_mask = scored.pool, scored.without_mask, scored.empty_mask
    notes = []
    if without_mask:
        notes.append(
            f"{len(without_mask)} defective images have no mask and count only in the image metrics "
            f"(first: {without_mask[0]})"
        )
    if empty_mask:
        notes.append(
            f"{len(empty_mask)} masks of defective images mark no pixel; these images count as "
            f"defect-free in the pixel metrics (first: {empty_mask[0]})"
        )
    if not pool.exact:
        notes.append(f"{pool.pixels} pixels are too many to keep: values were binned, see each metric's error")
    return notes
