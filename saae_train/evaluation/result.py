"""The result of an evaluation: metrics overall and by defect type, image scores, curves; as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .curves import Curve
from .ranking import Metric

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Evaluation", "ImageScore", "Subset"]


@dataclass(frozen=True)
class ImageScore:
    """One test image: (height, width), score, largest value of the map, and the scorer's time in seconds."""

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
    pixel_fpr split in two: pixel_fpr_good, of the good images, which is what T is set for, and pixel_fpr_halo, of the
    pixels around the defects, where a map is never as sharp as a mask.
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
    """The result of `evaluate`. `threshold` and `image_threshold` are the T that was used, None without one."""

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
        """A metric over all images, by its key (see `Subset`)."""
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
        # narrow, so that the names of defect types fit into 80 columns
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
                f"pixels above T = {self.threshold:.4g}: {good} of good images (what T is set for), "
                f"{halo} around the defects of defective ones (in percent)"
            )
        if self.image_threshold is not None:
            fpr, tpr = self.overall.metrics["image_fpr"], self.overall.metrics["image_tpr"]
            lines.append(f"images above T = {self.image_threshold:.4g}: FPR {fpr}, TPR {tpr} (in percent)")
        return [*lines, *self.notes]
