"""Draws simulated defects onto images of normal parts, with the exact mask of what was changed.

For products without images of defects. A model that misses these is of little use; a model that finds all of them may
still miss a real defect, which looks different. Every result made from these images says "simulated".

Deterministic: the same frame, donor, kind, size, contrast and seed give the same image. Size and
contrast of a `Simulated` are measured on the pixels that differ.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from saae_runtime.errors import ConfigError, SimulationError

from .ground import Ground, find_ground
from .kinds import PAINTERS, Window

__all__ = ["CONTRASTS", "KINDS", "MIN_SIDE", "SIZES", "Simulated", "contrast_class", "simulate", "size_class"]

KINDS: tuple[str, ...] = tuple(PAINTERS)
SIZES: dict[str, tuple[float, float]] = {"small": (0.03, 0.06), "medium": (0.08, 0.14), "large": (0.2, 0.32)}
"""Drawn sizes: pixels across the longest direction, as a share of the square root of the image's area."""
CONTRASTS: dict[str, tuple[float, float]] = {"faint": (6.0, 11.0), "clear": (14.0, 28.0), "strong": (40.0, 75.0)}
"""Drawn contrasts: mean absolute change inside the mask in grey levels of 255, for kinds with a settable contrast."""
MIN_SIDE = 32
"""Smallest side of an image: on smaller ones, a small defect would be only a few pixels."""

_SIZE_LIMITS = (0.07, 0.17)
_CONTRAST_LIMITS = (12.0, 35.0)
_CHANGED = 3  # grey levels: smaller changes are undone and not part of the mask
_VISIBLE = 2.0  # grey levels, see `_seen`
_FEWEST = 6  # pixels
_TRIES = 8


@dataclass(frozen=True)
class Simulated:
    """A frame with one simulated defect.

    Attributes:
        frame: uint8 H x W x 3; outside `mask` it equals the original bit for bit.
        mask: bool H x W, the defect's pixels (small gaps inside are closed).
        kind: one of `KINDS`.
        extent: pixels across the longest direction of the mask.
        area: pixels of the mask.
        relative: `extent` as a share of the square root of the image's area.
        contrast: mean absolute change inside the mask over its pixels and channels, grey levels of 255.
    """

    frame: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    kind: str
    extent: float
    area: int
    relative: float
    contrast: float

    @property
    def size(self) -> str:
        """The class of its measured size."""
        return size_class(self.relative)

    @property
    def strength(self) -> str:
        """The class of its measured contrast."""
        return contrast_class(self.contrast)


def size_class(relative: float) -> str:
    """small, medium or large: an extent below 7 %, below 17 %, or more of the square root of the image's area."""
    return tuple(SIZES)[sum(relative >= limit for limit in _SIZE_LIMITS)]


def contrast_class(contrast: float) -> str:
    """faint, clear or strong: a mean change of less than 12, less than 35, or more grey levels."""
    return tuple(CONTRASTS)[sum(contrast >= limit for limit in _CONTRAST_LIMITS)]


def simulate(
    frame: NDArray[np.uint8],
    kind: str,
    size: str,
    contrast: str,
    *,
    seed: int = 0,
    donor: NDArray[np.uint8] | None = None,
) -> Simulated | None:
    """Draw one defect onto a normal frame, on the product if it can be told from the background.

    Args:
        frame: uint8 H x W x 3.
        kind: one of `KINDS`.
        size: key of `SIZES`; contrast: key of `CONTRASTS`. Both are requests; the result has the measured values.
        seed: another seed draws another defect.
        donor: uint8 h x w x 3, another normal image of the product, to take patches from.

    Returns:
        The frame with its defect; None if several tries changed nothing visible (a patch pasted onto the
        same texture, a blur on a plain surface).

    Raises:
        SimulationError: the frame is smaller than `MIN_SIDE` on one side.
        ConfigError: an unknown kind, size or contrast.
    """
    for value, known, what in ((kind, PAINTERS, "kind"), (size, SIZES, "size"), (contrast, CONTRASTS, "contrast")):
        if value not in known:
            raise ConfigError(
                f"There is no simulated defect of {what} {value!r}.",
                f"There are: {', '.join(known)}.",
                "use one of these",
            )
    height, width = frame.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise SimulationError(
            f"An image of {height} x {width} pixels is too small to draw defects on.",
            f"A small defect would be only a few pixels; the shorter side must have at least {MIN_SIDE}.",
            "use larger images, or leave the self-test out",
        )
    digest = hashlib.sha256(np.ascontiguousarray(frame).tobytes()).digest()
    names = hashlib.sha256(f"{kind}/{size}/{contrast}".encode()).digest()
    key = [seed, int.from_bytes(digest[:8], "big"), int.from_bytes(names[:8], "big")]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    ground = find_ground(frame)
    sources = ((frame, ground),) if donor is None else ((frame, ground), (donor, find_ground(donor)))
    gray = bool((frame[..., 0] == frame[..., 1]).all() and (frame[..., 1] == frame[..., 2]).all())
    scale = math.sqrt(height * width)
    for _ in range(_TRIES):
        extent = max(4.0, float(rng.uniform(*SIZES[size])) * scale)
        extent = min(extent, 0.9 * min(height, width))
        target = float(rng.uniform(*CONTRASTS[contrast]))
        row, column = _place(rng, ground, extent, kind)
        side = 2 * math.ceil(0.55 * extent + 4) + 1
        top, left = row - side // 2, column - side // 2
        window = Window(rng, _cut(frame, top, left, side), top, left, extent, target, gray, sources, ground)
        found = _composed(frame, window, kind, scale)
        if found is not None and _on_product(found.mask, ground):
            return found
    return None


def _place(rng: np.random.Generator, ground: Ground, extent: float, kind: str) -> tuple[int, int]:
    """The defect's middle: anywhere on the product, also at its edges, mostly not cut off by the image's edge."""
    height, width = ground.product.shape
    margin = int(min(0.4 * extent, (min(height, width) - 1) / 2))
    inner = np.zeros_like(ground.product)
    inner[margin : height - margin, margin : width - margin] = True
    allowed = ground.product & inner
    if kind == "missing part" and ground.surface is not None and rng.random() < 0.6:
        depth = ndimage.distance_transform_edt(ground.product)
        rim = allowed & (depth > 0.1 * extent) & (depth < 0.4 * extent)
        allowed = rim if rim.any() else allowed
    places = np.flatnonzero(allowed if allowed.any() else inner)
    return divmod(int(places[int(rng.integers(places.size))]), width)  # type: ignore[return-value]


def _cut(frame: NDArray[np.uint8], top: int, left: int, side: int) -> NDArray[np.float32]:
    rows = np.clip(np.arange(top, top + side), 0, frame.shape[0] - 1)
    columns = np.clip(np.arange(left, left + side), 0, frame.shape[1] - 1)
    return frame[np.ix_(rows, columns)].astype(np.float32)


def _composed(frame: NDArray[np.uint8], window: Window, kind: str, scale: float) -> Simulated | None:
    """Paint and round, find the pixels that changed, restore the others, and measure; None if nothing can be seen."""
    layer, cover = PAINTERS[kind](window)
    drawn = np.clip(np.rint(window.pixels + cover[:, :, None] * (layer - window.pixels)), 0, 255).astype(np.uint8)
    height, width = frame.shape[:2]
    top, left, side = window.top, window.left, window.side
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    drawn = drawn[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    cover = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    before = frame[rows, columns]
    mask = _changed(before, drawn, cover)
    if int(mask.sum()) < _FEWEST:
        return None
    after = np.where(mask[:, :, None], drawn, before)
    if not _seen(before, after, mask, scale):
        return None
    whole, place = frame.copy(), np.zeros((height, width), bool)
    whole[rows, columns] = after
    place[rows, columns] = mask
    extent = _extent(mask)
    contrast = float(np.abs(after[mask].astype(np.int16) - before[mask]).mean())
    return Simulated(whole, place, kind, extent, int(mask.sum()), extent / scale, contrast)


def _changed(before: NDArray[np.uint8], after: NDArray[np.uint8], cover: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mask of the difference inside the painted shape, with gaps closed and tiny areas dropped."""
    change = np.abs(after.astype(np.int16) - before).max(axis=2)
    painted = cover > 0.05
    mask = ndimage.binary_closing(np.pad((change >= _CHANGED) & painted, 3), iterations=2)[3:-3, 3:-3]
    mask = ndimage.binary_fill_holes(mask) & painted
    labels, count = ndimage.label(mask, np.ones((3, 3), bool))
    if count > 1:
        area = np.bincount(labels.ravel())
        keep = area >= max(_FEWEST, 0.03 * mask.sum())
        keep[0] = False
        mask = keep[labels]
    return np.asarray(mask, np.bool_)


def _seen(before: NDArray[np.uint8], after: NDArray[np.uint8], mask: NDArray[np.bool_], scale: float) -> bool:
    """Whether the change is visible: in the level over a small neighbourhood, or in the amount of fine detail.

    Single pixels do not tell: a patch of grass pasted onto grass changes all of them, invisibly.
    """
    sigma = max(1.0, 0.01 * scale)
    a, b = before.astype(np.float32), after.astype(np.float32)
    smooth_a, smooth_b = (ndimage.gaussian_filter(x, (sigma, sigma, 0)) for x in (a, b))
    level = np.abs(smooth_b - smooth_a)[mask].mean(axis=0).max()
    detail = np.abs(np.abs(b - smooth_b)[mask].mean(axis=0) - np.abs(a - smooth_a)[mask].mean(axis=0)).max()
    return bool(max(level, detail) >= _VISIBLE)


def _on_product(mask: NDArray[np.bool_], ground: Ground) -> bool:
    return ground.surface is None or float(ground.product[mask].mean()) >= 0.6


def _extent(mask: NDArray[np.bool_]) -> float:
    """Pixels across the longest direction (largest of 36)."""
    rows, columns = np.nonzero(mask)
    angles = np.linspace(0.0, math.pi, 36, endpoint=False)
    along = np.outer(np.cos(angles), columns) + np.outer(np.sin(angles), rows)
    return float((along.max(axis=1) - along.min(axis=1)).max()) + 1.0
