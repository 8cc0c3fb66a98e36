"""Draws frames for the page: scaled to a screen, with heat and outline, as JPEG or PNG."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ... import render
from ...result import Result

__all__ = ["Layer", "jpeg", "levels_png", "picture"]

Layer = Literal["frame", "overlay", "heat"]

_QUALITY = 88
_WHITE = 65535


def picture(frame: NDArray[np.uint8], result: Result | None, layer: Layer, most: int) -> NDArray[np.uint8]:
    """Draw a frame.

    Args:
        frame: uint8 H x W x 3.
        result: of the frame; None draws only the frame.
        layer: `frame`: unchanged; `overlay`: with heat and outline; `heat`: the map in colours.
        most: largest number of pixels of the longer side; frames are scaled before drawing.

    Returns:
        uint8 h x w x 3.
    """
    from PIL import Image

    height, width = frame.shape[:2]
    scale = min(most / max(height, width), 1.0)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = frame if scale == 1.0 else np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
    if layer == "frame" or result is None:
        return small
    anomaly_map: NDArray[Any] = result.anomaly_map
    mask: NDArray[Any] = result.mask
    if scale < 1.0:
        anomaly_map = np.asarray(Image.fromarray(anomaly_map).resize(size, Image.Resampling.BOX))
        # A defect of one pixel stays visible: any part of it in a screen pixel sets that pixel.
        mask = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)) > 0
    if layer == "heat":
        return render.heatmap(anomaly_map, result.threshold)
    return render.overlay(small, anomaly_map, mask, threshold=result.threshold)


def jpeg(values: NDArray[np.uint8]) -> bytes:
    """A picture as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)  # a thin outline keeps its colour
    return buffer.getvalue()


def levels_png(result: Result) -> tuple[bytes, float]:
    """The anomaly map as a 16-bit gray PNG, and the score of one level.

    Values below 0 become 0. The brightest level is the map's maximum, or T if that is higher.
    """
    from PIL import Image

    top = max(float(result.anomaly_map.max()), result.threshold, float(np.finfo(np.float32).tiny))
    levels = np.rint(np.clip(result.anomaly_map / top, 0.0, 1.0) * _WHITE).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue(), top / _WHITE
