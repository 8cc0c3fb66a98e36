"""Estimates where the product lies in an image of a normal part, and the background behind it.

A simulated defect on an empty background proves nothing, so defects are placed on the product. A smooth surface of
colour (quadratic in the position) is fitted robustly to the image's border. Otsu's threshold splits the distances from
it in two groups; the far one is the product. If the border is not uniform, if the groups overlap, or if almost nothing
or almost everything would be product, the image is taken to show the product alone (a texture, a tile). This only
places defects: no metric depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from saae_runtime.geometry import resize_frames

__all__ = ["Ground", "find_ground"]

_SIDE = 128  # pixels of the reduced image's longer side
_PLAIN = 8.0  # grey levels: a border with a larger typical distance from its surface is not uniform
_LEAST = 20.0  # grey levels: smallest distance of a product from the surface
_VALLEY = 0.12  # at most this share of the pixels may lie within a quarter of the threshold around it


@dataclass(frozen=True)
class Ground:
    """The product's region and the background's colour.

    Attributes:
        product: bool H x W, True where the product lies; all True where no background was found.
        surface: float32 6 x 3, the background's colour (columns: RGB) by the terms of `_terms`; None without one.
        grain: typical deviation of the background from the surface in grey levels.
    """

    product: NDArray[np.bool_]
    surface: NDArray[np.float32] | None
    grain: float

    def background(self, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """The background's colour in a window, float32 height x width x 3 (no grain)."""
        assert self.surface is not None
        rows = (np.arange(top, top + height, dtype=np.float32) + 0.5) / self.product.shape[0]
        columns = (np.arange(left, left + width, dtype=np.float32) + 0.5) / self.product.shape[1]
        return np.clip(_terms(rows, columns) @ self.surface, 0.0, 255.0)


def _terms(rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """1, y, x, yy, xy, xx at each place; rows and columns as shares of the image's height and width."""
    y = np.broadcast_to(rows[:, None], (rows.size, columns.size))
    x = np.broadcast_to(columns[None, :], y.shape)
    return np.stack([np.ones_like(y), y, x, y * y, x * y, x * x], axis=-1)


def find_ground(frame: NDArray[np.uint8]) -> Ground:
    """Estimate product and background of one image; see the head of this file.

    Args:
        frame: uint8 H x W x 3.
    """
    height, width = frame.shape[:2]
    whole = Ground(np.ones((height, width), bool), None, 0.0)
    factor = min(1.0, _SIDE / max(height, width))
    small = resize_frames(frame, (max(8, round(height * factor)), max(8, round(width * factor)))).astype(np.float32)
    rows, columns = small.shape[:2]
    design = _terms(
        (np.arange(rows, dtype=np.float32) + 0.5) / rows, (np.arange(columns, dtype=np.float32) + 0.5) / columns
    )
    small = ndimage.gaussian_filter(small, (0.7, 0.7, 0))
    ring = np.ones((rows, columns), bool)
    rim = max(2, round(0.03 * min(rows, columns)))
    ring[rim:-rim, rim:-rim] = False
    a, b = design[ring], small[ring]
    # Start with the median, then fit surfaces to the pixels near the previous one.
    surface = np.zeros((6, 3), np.float32)
    surface[0] = np.median(b, axis=0)
    for _ in range(6):
        distance = np.abs(b - a @ surface).max(axis=1)
        near = distance <= max(2.5 * float(np.median(distance)), 6.0)
        surface = np.linalg.lstsq(a[near], b[near], rcond=None)[0].astype(np.float32)
    distance = np.abs(b - a @ surface).max(axis=1)
    typical = float(np.median(distance))
    if typical > _PLAIN:
        return whole
    off = np.abs(small - design @ surface).max(axis=2)
    limit = max(_otsu(off), _LEAST)
    if float((np.abs(off - limit) < 0.25 * limit).mean()) > _VALLEY:
        return whole
    apart = off > limit
    apart = ndimage.binary_opening(np.pad(apart, 2, mode="edge"), iterations=1)[2:-2, 2:-2]
    apart = ndimage.binary_closing(np.pad(apart, 4), iterations=3)[4:-4, 4:-4]
    labels, count = ndimage.label(ndimage.binary_fill_holes(apart))
    if not count:
        return whole
    area = np.bincount(labels.ravel())
    keep = area >= 0.02 * labels.size
    keep[0] = False
    product = keep[labels]
    if not 0.05 <= product.mean() <= 0.95:
        return whole
    grain = float(np.std((small - design @ surface)[~product])) if (~product).any() else 0.0
    index_y = np.minimum((np.arange(height) * rows) // height, rows - 1)
    index_x = np.minimum((np.arange(width) * columns) // width, columns - 1)
    return Ground(product[np.ix_(index_y, index_x)], surface, min(grain, typical * 1.5 + 1.0))


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that splits values of 0..255 into the two groups with the least variance inside (Otsu 1979)."""
    counts = np.bincount(np.clip(values, 0, 255).astype(np.int64).ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    total = np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(below * above * (total / below - (total[-1] - total) / above) ** 2)
    return float(np.argmax(between)) + 1.0
