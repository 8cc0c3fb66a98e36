"""The result for one frame: score and anomaly map; from an engine also mask, thresholds and regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .regions import Region, find_regions

__all__ = ["Region", "Result", "Scored", "Scorer", "decision"]


@dataclass(frozen=True, eq=False)
class Scored:
    """Score and map of one frame of H x W pixels.

    Attributes:
        score: anomaly score of the whole frame.
        anomaly_map: A, float32 H x W (paper eq. 3).
    """

    score: float
    anomaly_map: NDArray[np.float32]


Scorer = Callable[[NDArray[np.uint8]], Scored]
"""Scores one frame, uint8 H x W x 3 (RGB); for example a `saae_runtime.Engine`, or a fitted model in PyTorch."""


@dataclass(frozen=True, eq=False, repr=False)
class Result(Scored):
    """The result for one frame of H x W pixels. The arrays are read-only; copy them to change them.

    Attributes:
        score: anomaly score of the whole frame.
        anomaly_map: A, float32 H x W, at the frame's own size (paper eq. 3).
        mask: bool H x W, the defects behind the verdict; see `saae_runtime.regions.defect_mask`. Empty if the frame is
            not anomalous. All of A > T is `anomaly_map > threshold`.
        threshold: pixel threshold T.
        image_threshold: image threshold.
        rank: share of the normal calibration images with a lower score, from 0 to 1 (see
            `ThresholdTable.share_below`). It never falls as the score rises. None without a table.

    Example:
        >>> result = engine(frame)                      # doctest: +SKIP
        >>> if result.is_anomalous:                     # doctest: +SKIP
        ...     print(result.score, result.regions()[0].bbox)
    """

    mask: NDArray[np.bool_]
    threshold: float
    image_threshold: float
    rank: float | None = None

    @property
    def is_anomalous(self) -> bool:
        """Whether the score is above the image threshold."""
        return self.score > self.image_threshold

    @property
    def reason(self) -> str:
        """One sentence: the verdict, and which threshold decided it."""
        return decision(self.score, self.image_threshold)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.anomaly_map.shape
        return height, width

    def heatmap(self) -> NDArray[np.uint8]:
        """The anomaly map in colours, uint8 H x W x 3; T always has the same colour, so frames can be compared."""
        from . import render

        return render.heatmap(self.anomaly_map, self.threshold)

    def overlay(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frame with heat laid over it and the mask outlined, uint8 H x W x 3.

        Args:
            frame: the frame that was scored, uint8 H x W x 3 or H x W.

        Raises:
            FrameError: a frame of a different size.
        """
        from . import render

        return render.overlay(frame, self.anomaly_map, self.mask, threshold=self.threshold)

    def regions(self, min_area: int = 1) -> tuple[Region, ...]:
        """The connected defects of the mask (8-connectivity) of at least `min_area` pixels, strongest first."""
        return find_regions(self.mask, self.anomaly_map, min_area)

    def coco(self, min_area: int = 1) -> list[dict[str, Any]]:
        """The regions as COCO annotations without ids: `bbox` (x, y, width, height), `area`, `score`, `segmentation`.

        The segmentation is run-length encoded, as pycocotools reads it; see `saae_runtime.rle.coco_rle`.
        """
        from .regions import region_masks
        from .rle import coco_rle

        found = []
        for region, mask in region_masks(self.mask, self.anomaly_map, min_area):
            left, top, right, bottom = region.bbox
            box = [left, top, right - left, bottom - top]
            found.append({"bbox": box, "area": region.area, "score": region.score, "segmentation": coco_rle(mask)})
        return found

    def detections(self, min_area: int = 1) -> Any:
        """The regions as `supervision.Detections`: boxes, masks, scores, and `area` and `peak` in `data`.

        Raises:
            ConfigError: the package supervision is not installed.
        """
        from .detections import to_detections

        return to_detections(self, min_area)

    def to_dict(self, min_area: int = 1) -> dict[str, Any]:
        """Everything except the arrays, as JSON values; the mask as its regions and its share of the frame."""
        height, width = self.size
        return {
            "score": self.score,
            "rank": self.rank,
            "is_anomalous": self.is_anomalous,
            "reason": self.reason,
            "threshold": self.threshold,
            "image_threshold": self.image_threshold,
            "height": height,
            "width": width,
            "defect_share": float(self.mask.mean()),
            "regions": [region.to_dict() for region in self.regions(min_area)],
        }

    def __repr__(self) -> str:
        height, width = self.size
        verdict = "anomalous" if self.is_anomalous else "normal"
        return f"Result({verdict}, score={self.score:.4g} (limit {self.image_threshold:.4g}), {height} x {width})"


def decision(score: float, image_threshold: float) -> str:
    """One sentence: the verdict by the image score and the image threshold.

    The numbers have four digits, or more if needed to distinguish them.
    """
    shown = f"{score!r}", f"{image_threshold!r}"
    for digits in range(4, 17):
        texts = f"{score:.{digits}g}", f"{image_threshold:.{digits}g}"
        if texts[0] != texts[1] or score == image_threshold:
            shown = texts
            break
    if score > image_threshold:
        return f"defective: image score {shown[0]} is above the image threshold {shown[1]}"
    return f"clean: image score {shown[0]} is not above the image threshold {shown[1]}"
