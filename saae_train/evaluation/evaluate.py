"""Score a category's test images and measure the result, by defect type and overall.

Everything is taken at the images' own resolution: a map of another size is brought to its image's first,
by the runtime's one upsampling. Images are read, scored and pooled one by one, so memory holds the pool
(4 bytes a pixel, bounded; see pixel_pool.py) and never a list of maps. What cannot be measured carries its reason.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.geometry import upsample_map
from saae_train.data.category import GOOD, Category, Sample
from saae_train.evaluation.bootstrap import ranked_intervals, score_intervals, share_interval
from saae_train.evaluation.curves import Curve, Shown, curves
from saae_train.evaluation.metrics import PRO_LIMIT, pool_metrics
from saae_train.evaluation.pixel_pool import EXACT_PIXELS, PixelPool
from saae_train.evaluation.ranking import Metric, Ranking, average_precision_of, best_f1_of, rates_of, roc_auc_of

if TYPE_CHECKING:
    from rich.table import Table

Scorer = Callable[[NDArray[np.uint8]], Any]
"""Frame uint8 [H, W, 3] RGB to `(score, anomaly_map [h, w])`, or to an object with those two attributes
(a `saae_runtime.Engine` is one)."""


@dataclass(frozen=True)
class ImageScore:
    """One test image: its (height, width), its score, its map's largest value, and the seconds the scorer took."""

    file: str
    size: tuple[int, int]
    label: str
    is_anomalous: bool
    score: float
    peak: float
    seconds: float


@dataclass(frozen=True)
class Subset:
    """Metrics of one defect type together with the good images, or of all images ("overall").

    Keys of `metrics`: pixel_roc_auc, pro_auc, pixel_average_precision, pixel_best_f1, image_roc_auc,
    image_average_precision, image_best_f1; with thresholds also pixel_fpr, pixel_tpr, image_fpr, image_tpr, and
    pixel_fpr in its parts: pixel_fpr_good, of the good images, which is what T promises, and pixel_fpr_halo, of the
    pixels of defective images beside the defect, where a map is never as sharp as a mask.
    """

    label: str
    images: int
    defective: int
    metrics: dict[str, Metric]

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "images": self.images,
            "defective": self.defective,
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` found. `threshold` and `image_threshold` are the T in force, None when none was."""

    category: str
    synthetic: bool
    overall: Subset
    by_type: tuple[Subset, ...]
    images: tuple[ImageScore, ...]
    curves: tuple[Curve, ...]
    threshold: float | None
    image_threshold: float | None
    best_f1_threshold: float | None
    pro_limit: float
    exact: bool
    notes: tuple[str, ...]

    def metric(self, name: str) -> Metric:
        """A metric over all images, by its key (see Subset)."""
        return self.overall.metrics[name]

    def to_json(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "synthetic": self.synthetic,
            "overall": self.overall.to_json(),
            "by_type": [s.to_json() for s in self.by_type],
            "threshold": self.threshold,
            "image_threshold": self.image_threshold,
            "best_f1_threshold": self.best_f1_threshold,
            "pro_limit": self.pro_limit,
            "exact": self.exact,
            "notes": list(self.notes),
            "curves": [c.to_json() for c in self.curves],
            "images": [vars(i) for i in self.images],
        }

    def table(self, intervals: bool = False) -> Table:
        """The numbers in percent for a terminal, one row a defect type; reasons below the table."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        columns = {
            "pixel_roc_auc": "pixel ROC-AUC",
            "pro_auc": "PRO-AUC",
            "pixel_average_precision": "pixel AP",
            "image_roc_auc": "image ROC-AUC",
            "pixel_tpr": "TPR at T",
        }
        shown = {k: v for k, v in columns.items() if k in self.overall.metrics}
        title = f"{self.category} (synthetic data)" if self.synthetic else self.category
        caption = "\n".join(self._reasons()) or None
        # Narrow, so that 80 columns show every defect type's name whole.
        table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("defect type", no_wrap=True, overflow="fold")
        table.add_column("images", justify="right")
        for name in shown.values():
            table.add_column(name, justify="right")
        for subset in (*self.by_type, self.overall):
            cells = [subset.metrics[name] for name in shown]
            texts = [str(m) if intervals and m.value is not None else m.percent for m in cells]
            if subset is self.overall:
                table.add_section()
            table.add_row(subset.label, str(subset.images), *texts)
        return table

    def _reasons(self) -> list[str]:
        """Why numbers are missing, overall and in single defect types; the images' rates at T; notes."""
        lines = []
        overall = {m.reason for m in self.overall.metrics.values()}
        for subset in (self.overall, *self.by_type):
            names: dict[str, list[str]] = {}
            for name, metric in subset.metrics.items():
                if metric.reason and (subset is self.overall or metric.reason not in overall):
                    names.setdefault(metric.reason, []).append(name)
            of = "" if subset is self.overall else f"{subset.label}, "
            lines += [f"{of}{', '.join(found)}: {reason}" for reason, found in names.items()]
        if self.threshold is not None:
            good, halo = (self.overall.metrics[name] for name in ("pixel_fpr_good", "pixel_fpr_halo"))
            lines.append(
                f"pixels above T = {self.threshold:.4g}: {good} of good images (what T promises), "
                f"{halo} around the defects of defective ones (in percent)"
            )
        if self.image_threshold is not None:
            fpr, tpr = self.overall.metrics["image_fpr"], self.overall.metrics["image_tpr"]
            lines.append(f"images above T = {self.image_threshold:.4g}: FPR {fpr}, TPR {tpr} (in percent)")
        return [*lines, *self.notes]


def evaluate(
    scorer: Scorer,
    category: Category,
    *,
    samples: Iterable[Sample] | None = None,
    threshold: float | None = None,
    image_threshold: float | None = None,
    limit: float = PRO_LIMIT,
    intervals: bool = True,
    exact_pixels: int = EXACT_PIXELS,
    progress: bool | Callable[[int, int], None] = True,
) -> Evaluation:
    """Score the test images and measure everything (paper section 4.1.3 and more; see metrics.py).

    Args:
        scorer: see `Scorer`. When its results carry `threshold` and `image_threshold` (an Engine's do), those
            are T unless given here.
        category: the images; masks are read from the samples.
        samples: other images than `category.test`.
        threshold: pixel T; image_threshold: image T. `value > T` means defective.
        limit: FPR up to which PRO counts.
        intervals: add 95 % bootstrap intervals over images.
        exact_pixels: pixels kept exactly; beyond, values are binned and the error bound is stated.
        progress: show a progress bar on the terminal, or what to call with (done, total) instead.

    Raises:
        DataError: no test image; a mask of another size; a score or map that is not finite (the image is named).
        ConfigError: the scorer returns something else than a score and a map.
    """
    chosen = tuple(category.test if samples is None else samples)
    if not chosen:
        raise DataError(
            f"Category {category.name!r} has no test image.",
            "There is nothing to evaluate on.",
            "add images under test/good and test/<defect type>",
        )
    pool = PixelPool(exact_pixels)
    rows: list[ImageScore] = []
    without_mask: list[str] = []
    empty_mask: list[str] = []
    counts: list[_Counts] = []
    with _progress(f"evaluate {category.name}", len(chosen), progress) as advance:
        for sample in chosen:
            frame = sample.read()
            start = time.perf_counter()
            result = scorer(frame)
            seconds = time.perf_counter() - start
            score, anomaly_map = unpack(result)
            if threshold is None:
                threshold = _optional(result, "threshold")
            if image_threshold is None:
                image_threshold = _optional(result, "image_threshold")
            if not np.isfinite(score):
                raise DataError(
                    f"{sample.path}: the score is {score}.",
                    "A score that is not finite cannot be ranked.",
                    "look for NaN weights or an FP16 overflow in the model",
                )
            label = sample.label if sample.is_anomalous else GOOD
            if sample.is_anomalous and sample.mask is None:
                without_mask.append(str(sample.path))
            else:
                mask = sample.truth() if sample.is_anomalous else None
                if mask is not None and not mask.any():
                    empty_mask.append(str(sample.mask))
                full = upsample_map(anomaly_map, frame.shape[:2])
                pool.add(full, mask, label, str(sample.path))
                if threshold is not None:
                    counts.append(_Counts.of(full, mask, label, threshold))
            height, width = frame.shape[:2]
            peak = float(anomaly_map.max())
            rows.append(ImageScore(str(sample.path), (height, width), label, sample.is_anomalous, score, peak, seconds))
            advance()
    notes = _notes(pool, without_mask, empty_mask)
    types = sorted({r.label for r in rows if r.is_anomalous})
    unmasked = set(without_mask)

    def subset(name: str, kept: list[ImageScore], groups: set[str] | None) -> Subset:
        found = pool_metrics(pool, groups, limit=limit, intervals=intervals)
        if threshold is not None:
            found.update(_pixel_rates(pool, threshold, groups, counts, intervals))
        if any(r.file in unmasked for r in kept) and pool.ranking(groups).total_positives == 0:
            # Without masks nothing says which pixels are defective; those of the good images still have an FPR.
            reason = "the defective images have no ground-truth masks"
            found = {
                key: metric if key.startswith("pixel_fpr") else Metric(None, reason) for key, metric in found.items()
            }
        found.update(_image_metrics(kept, intervals))
        if image_threshold is not None:
            found.update(_image_rates(kept, image_threshold, intervals))
        return Subset(name, len(kept), sum(r.is_anomalous for r in kept), found)

    overall_ranking = pool.ranking()
    return Evaluation(
        category=category.name,
        synthetic=category.synthetic,
        overall=subset("overall", rows, None),
        by_type=tuple(
            subset(name, [r for r in rows if r.label == name or not r.is_anomalous], {name, GOOD}) for name in types
        ),
        images=tuple(rows),
        curves=tuple(curves(overall_ranking, limit) + curves(_image_ranking(rows))),
        threshold=threshold,
        image_threshold=image_threshold,
        best_f1_threshold=best_f1_of(overall_ranking).threshold,
        pro_limit=limit,
        exact=pool.exact,
        notes=tuple(notes),
    )


def representatives(evaluation: Evaluation, per_type: int = 1) -> list[ImageScore]:
    """Images to show: of each label those around its median score, so that neither luck nor failure is picked."""
    chosen: list[ImageScore] = []
    for label in [GOOD, *sorted({i.label for i in evaluation.images if i.is_anomalous})]:
        ranked = sorted((i for i in evaluation.images if i.label == label), key=lambda i: (i.score, i.file))
        start = max(0, (len(ranked) - per_type) // 2)
        chosen += ranked[start : start + per_type]
    return chosen


def shown(scorer: Scorer, category: Category, chosen: Iterable[ImageScore]) -> list[Shown]:
    """Columns for `curves.qualitative_sheet`: the chosen test images, scored once more for their maps."""
    samples = {str(s.path): s for s in category.test}
    columns = []
    for image in chosen:
        sample = samples[image.file]
        frame = sample.read()
        _, anomaly_map = unpack(scorer(frame))
        truth = sample.truth()
        if not sample.is_anomalous:
            truth = np.zeros(frame.shape[:2], np.bool_)
        columns.append(Shown(image.label, frame, truth, upsample_map(anomaly_map, frame.shape[:2])))
    return columns


def unpack(result: Any) -> tuple[float, NDArray[np.float32]]:
    """Score and map (float32 h x w) of what a `Scorer` returned.

    Raises:
        ConfigError: it is neither a pair nor an object with both, or the map is not one frame's.
    """
    pair = result if isinstance(result, tuple) else (_optional(result, "score"), getattr(result, "anomaly_map", None))
    if len(pair) != 2 or pair[0] is None or pair[1] is None:
        raise ConfigError(
            f"The scorer returned a {type(result).__name__}.",
            "It must return (score, anomaly_map), or an object with these attributes.",
            "pass a saae_runtime.Engine, or wrap the model in a function that returns both",
        )
    anomaly_map = np.asarray(pair[1])
    if anomaly_map.ndim != 2 or anomaly_map.dtype.kind != "f":
        raise ConfigError(
            f"The scorer's map has shape {anomaly_map.shape} and type {anomaly_map.dtype}.",
            "One frame's map is H x W of floats.",
            "drop the batch and channel axes of the map",
        )
    return float(pair[0]), anomaly_map.astype(np.float32, copy=False)


def _optional(result: Any, name: str) -> float | None:
    value = getattr(result, name, None)
    return None if value is None else float(value)


def _image_ranking(rows: list[ImageScore]) -> Ranking:
    return Ranking.from_scores([r.score for r in rows], [r.is_anomalous for r in rows])


def _image_metrics(rows: list[ImageScore], intervals: bool) -> dict[str, Metric]:
    ranking = _image_ranking(rows)
    area, precision, f1 = roc_auc_of(ranking), average_precision_of(ranking), best_f1_of(ranking).f1
    if intervals:
        scores, labels = [r.score for r in rows], [r.is_anomalous for r in rows]
        area = _with(area, score_intervals(scores, labels))
        both = ranked_intervals(scores, labels) or (None, None)
        precision, f1 = _with(precision, both[0]), _with(f1, both[1])
    return {"image_roc_auc": area, "image_average_precision": precision, "image_best_f1": f1}


def _image_rates(rows: list[ImageScore], threshold: float, intervals: bool) -> dict[str, Metric]:
    labels = np.array([r.is_anomalous for r in rows], bool)
    scores = np.array([r.score for r in rows])
    found = rates_of(scores, labels, threshold)
    fpr, tpr = found.fpr, found.tpr
    if intervals:
        hit = scores > threshold
        fpr = _with(fpr, share_interval(hit & ~labels, ~labels, labels))
        tpr = _with(tpr, share_interval(hit & labels, labels, labels))
    return {"image_fpr": fpr, "image_tpr": tpr}


@dataclass(frozen=True)
class _Counts:
    """Pixels of one image, and those of them above T: defect-free and defective."""

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
        "pixel_fpr_good": _false_alarms([c for c in kept if c.label == GOOD], "there is no good image", intervals),
        "pixel_fpr_halo": _false_alarms(
            [c for c in kept if c.label != GOOD], "there is no defective image with a mask", intervals
        ),
    }
    if intervals:
        defective = [c.positive > 0 for c in kept]
        fpr = _with(fpr, share_interval([c.false_alarms for c in kept], [c.negative for c in kept], defective))
        tpr = _with(tpr, share_interval([c.found for c in kept], [c.positive for c in kept], defective))
    return {"pixel_fpr": fpr, "pixel_tpr": tpr, **parts}


def _false_alarms(counts: list[_Counts], otherwise: str, intervals: bool) -> Metric:
    """Share of the defect-free pixels of some images above T."""
    negative = sum(c.negative for c in counts)
    if not negative:
        return Metric(None, otherwise)
    rate = Metric(sum(c.false_alarms for c in counts) / negative)
    if not intervals:
        return rate
    groups = [False] * len(counts)
    return _with(rate, share_interval([c.false_alarms for c in counts], [c.negative for c in counts], groups))


def _with(metric: Metric, bounds: tuple[float, float] | None) -> Metric:
    return metric if metric.value is None or bounds is None else metric.with_interval(*bounds)


def _notes(pool: PixelPool, without_mask: list[str], empty_mask: list[str]) -> list[str]:
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


@contextmanager
def _progress(title: str, total: int, show: bool | Callable[[int, int], None]) -> Iterator[Callable[[], None]]:
    if not isinstance(show, bool):
        call, count = show, itertools.count(1)
        yield lambda: call(next(count), total)
        return
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
