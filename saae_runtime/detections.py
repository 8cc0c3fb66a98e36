"""A result as the detections of the package supervision: boxes, masks and scores for its annotators and trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .regions import region_masks

if TYPE_CHECKING:
    from .result import Result

__all__ = ["to_detections"]


def to_detections(result: Result, min_area: int = 1) -> Any:
    """One detection per region, strongest first; see `Result.detections`."""
    try:
        import supervision
    except ImportError as error:
        raise ConfigError("Detections need the package supervision.", str(error), "pip install supervision") from error
    found = list(region_masks(result.mask, result.anomaly_map, min_area))
    if not found:
        return supervision.Detections.empty()
    return supervision.Detections(
        xyxy=np.array([region.bbox for region, _ in found], np.float32),
        mask=np.stack([mask for _, mask in found]),
        confidence=np.array([region.score for region, _ in found], np.float32),
        class_id=np.zeros(len(found), int),
        data={
            "class_name": np.array(["defect"] * len(found)),
            "area": np.array([region.area for region, _ in found]),
            "peak": np.array([region.peak for region, _ in found]),
        },
    )
