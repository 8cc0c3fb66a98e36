"""The quality gate of INT8 and bf16: loss of ROC-AUC and PRO-AUC, and changed decisions, each at its own thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saae_runtime.engine import Engine
from saae_runtime.progress import Progress
from saae_train.data.category import Category, Sample
from saae_train.evaluation.result import Evaluation
from saae_train.selftest.run import selftest

__all__ = ["MOST_FALL", "MOST_FLIPS", "Quality", "Verdict", "compare_quality", "on_simulated_defects", "on_test_images"]

MOST_FALL = 0.003
"""Largest loss of pixel ROC-AUC and PRO-AUC, 0..1."""

MOST_FLIPS = 0.01
"""Largest share of images whose decision may differ."""


@dataclass(frozen=True)
class Quality:
    """Quality of one precision of a bundle.

    Attributes:
        on: the images, in words.
        pixel_roc_auc, pro_auc: 0..1.
        decisions: whether each of these images was called anomalous. Calibration images are not included: at FPR 0 the
            image threshold is their largest score, so none could flip.
    """

    on: str
    pixel_roc_auc: float
    pro_auc: float
    decisions: tuple[bool, ...]


@dataclass(frozen=True)
class Verdict:
    """The gate's result.

    Attributes:
        on: the images, in words.
        pixel_fall, pro_fall: how far ROC-AUC and PRO-AUC fell, 0..1; negative if they rose.
        flips: images decided differently.
        images: images decided.
    """

    on: str
    pixel_fall: float
    pro_fall: float
    flips: int
    images: int

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return max(self.pixel_fall, self.pro_fall) <= MOST_FALL and self.flips <= MOST_FLIPS * self.images

    def __str__(self) -> str:
        return (
            f"pixel ROC-AUC {-100 * self.pixel_fall:+.2f}, PRO-AUC {-100 * self.pro_fall:+.2f} points on {self.on}, "
            f"{self.flips} of {self.images} decisions differ"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "on": self.on,
            "pixel_roc_auc_fall": round(self.pixel_fall, 6),
            "pro_auc_fall": round(self.pro_fall, 6),
            "flips": self.flips,
            "images": self.images,
        }


def on_test_images(found: Evaluation) -> Quality | None:
    """From an evaluation at the engine's own thresholds; None if the test set leaves ROC-AUC or PRO-AUC undefined."""
    pixel, pro = found.metric("pixel_roc_auc").value, found.metric("pro_auc").value
    if pixel is None or pro is None or found.image_threshold is None:
        return None
    decisions = tuple(image.score > found.image_threshold for image in found.images)
    return Quality(f"{len(found.images)} test images", pixel, pro, decisions)


def on_simulated_defects(engine: Engine, category: Category, normal: Sequence[Sample], progress: Progress) -> Quality:
    """Measure an engine on simulated defects.

    Args:
        engine: at its own thresholds.
        category: says whether its images are drawn.
        normal: the calibration images; simulated defects are drawn onto them.
        progress: called with (done, total).

    Raises:
        SimulationError: nothing can be drawn onto these images.
    """
    simulated = selftest(
        engine,
        normal,
        threshold=engine.threshold,
        image_threshold=engine.image_threshold,
        synthetic=category.synthetic,
        progress=progress,
    )
    return Quality(
        f"{len(simulated.defects)} simulated defects",
        _value(simulated.pixel_roc_auc),
        _value(simulated.pro_auc),
        tuple(defect.found for defect in simulated.defects),
    )


def compare_quality(reference: Quality, candidate: Quality) -> Verdict:
    """Compare the candidate with the reference."""
    pairs = list(zip(reference.decisions, candidate.decisions, strict=True))
    return Verdict(
        candidate.on,
        reference.pixel_roc_auc - candidate.pixel_roc_auc,
        reference.pro_auc - candidate.pro_auc,
        sum(a != b for a, b in pairs),
        len(pairs),
    )


def _value(metric: Any) -> float:
    """A metric's value; NaN without one, which fails the gate."""
    return float("nan") if metric.value is None else float(metric.value)
