"""The kinds of simulated defects: each paints one window of a frame and returns its coverage.

A painter gets a `Window` and returns (layer, cover): float32 side x side x 3 grey levels, and float32 side x side in
0..1. The damaged window is `pixels + cover * (layer - pixels)`. Where possible the contrast is set; for a missing part,
a pasted patch and a blur it is only measured afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .ground import Ground
from .shapes import blob, perlin, rectangle, scratch

__all__ = ["PAINTERS", "Painted", "Window"]

F32 = NDArray[np.float32]
Painted = tuple[F32, F32]


@dataclass(frozen=True)
class Window:
    """The square of a frame that a defect is painted into.

    Attributes:
        rng: the defect's random stream.
        pixels: float32 side x side x 3, grey levels; beyond the frame its edge is repeated.
        top, left: where the square begins in the frame (may be negative).
        extent: wanted pixels across the defect's longest direction; the square is larger.
        target: wanted mean change inside the defect, grey levels.
        gray: the frame has no colour, so the defect has none either.
        sources: uint8 frames to take patches from, each with where its product lies.
        ground: the frame's own product and background.
    """

    rng: np.random.Generator
    pixels: F32
    top: int
    left: int
    extent: float
    target: float
    gray: bool
    sources: tuple[tuple[NDArray[np.uint8], Ground], ...]
    ground: Ground

    @property
    def side(self) -> int:
        return int(self.pixels.shape[0])


def _tint(window: Window) -> F32:
    """A colour's direction, float32 3, mean absolute value 1, the same in all channels of a gray frame."""
    if window.gray:
        return np.ones(3, np.float32)
    direction = window.rng.normal(0.0, 0.6, 3) + 1.0
    direction = np.maximum(np.abs(direction), 0.05) * np.sign(direction)
    return (direction / np.abs(direction).mean()).astype(np.float32)


def _shifted(window: Window, cover: F32, direction: F32) -> F32:
    """The window's pixels moved along a colour direction until the mean change under the cover is the target.

    In the direction that has room, because a white mark on white is invisible. Accounts for clipping at 0 and 255.
    """
    inside = cover > 0.08  # pixels that will be in the mask, faint edges included
    if not inside.any():
        return window.pixels
    under, weight = window.pixels[inside], cover[inside][:, None]
    room_up, room_down = (255.0 - under).mean(), under.mean()
    up = room_up >= window.target and (room_down < window.target or window.rng.random() < 0.5)
    if room_up < window.target and room_down < window.target:
        up = room_up > room_down
    step = direction * np.float32(window.target if up else -window.target)
    scale = 1.0
    for _ in range(6):
        found = np.abs(weight * (np.clip(under + scale * step, 0.0, 255.0) - under)).mean()
        if found >= 0.98 * window.target or scale > 8.0:
            break
        scale *= min(max(window.target / max(float(found), 1e-3), 1.05), 2.0)
    return np.clip(window.pixels + np.float32(scale) * step, 0.0, 255.0)


def _cut_paste(window: Window) -> Painted:
    """A patch from elsewhere on the product, or from another normal image, turned or mirrored.

    Of several places, takes the one whose difference is nearest to the wanted contrast.
    """
    rng, side = window.rng, window.side
    shape = rectangle if rng.random() < 0.5 else blob
    cover = shape(rng, side, window.extent, 1.5)
    inside = cover > 0.5
    best, best_miss = window.pixels, np.inf
    for _ in range(10):
        frame, ground = window.sources[int(rng.integers(len(window.sources)))]
        height, width = frame.shape[:2]
        if side > min(height, width):
            continue
        half = side // 2
        rows, columns = np.nonzero(ground.product[half : height - side + half + 1, half : width - side + half + 1])
        if not rows.size:
            continue
        pick = int(rng.integers(rows.size))
        patch = frame[rows[pick] : rows[pick] + side, columns[pick] : columns[pick] + side].astype(np.float32)
        patch = np.rot90(patch, int(rng.integers(4)))
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
        miss = abs(float(np.abs(patch - window.pixels)[inside].mean()) - window.target)
        if miss < best_miss:
            best, best_miss = np.ascontiguousarray(patch), miss
    return best, cover


def _scratch(window: Window) -> Painted:
    """A bent, thin stroke, lighter or darker than the surface."""
    width = max(1.3, window.extent * window.rng.uniform(0.025, 0.06))
    cover = scratch(window.rng, window.side, window.extent, width)
    tint = np.ones(3, np.float32) if window.gray else (0.7 + 0.3 * _tint(window)).astype(np.float32)
    return _shifted(window, cover, tint), cover


def _texture(window: Window) -> Painted:
    """A foreign texture: Perlin noise of two octaves or distorted stripes, in a shape cut out by noise."""
    rng, side = window.rng, window.side
    cover = blob(rng, side, window.extent, 1.5, rough=0.3)
    ragged = perlin(rng, side, window.extent / 3)
    cover = cover * np.clip((ragged + 0.35) * np.float32(window.extent / 4) + 0.5, 0.0, 1.0).astype(np.float32)
    cell = max(3.0, window.extent / rng.uniform(6.0, 12.0))
    noise = perlin(rng, side, cell) + 0.5 * perlin(rng, side, cell / 2)
    if rng.random() < 0.5:
        turn = rng.uniform(0.0, np.pi)
        y, x = np.mgrid[:side, :side].astype(np.float32)
        along = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))
        noise = np.sin(along * np.float32(2 * np.pi / cell) + 2.0 * noise)
    inside = cover > 0.5
    noise = noise / max(float(np.abs(noise[inside]).mean()) if inside.any() else 1.0, 1e-3)
    base = window.pixels[inside].mean(axis=0) if inside.any() else window.pixels.mean(axis=(0, 1))
    # Stay away from the ends of the scale, or half of the texture would be clipped.
    offset = np.clip(base + rng.normal(0.0, 0.5 * window.target), window.target, 255.0 - window.target)
    offset = offset - base if not window.gray else np.full(3, float((offset - base).mean()))
    pattern = noise[:, :, None] * _tint(window)
    weight = cover[:, :, None]
    strength, change, layer = np.float32(0.8 * window.target), 0.0, window.pixels
    for _ in range(4):
        layer = np.clip(base + offset + strength * pattern, 0.0, 255.0).astype(np.float32)
        change = float(np.abs(weight * (layer - window.pixels))[cover > 0.08].mean()) if inside.any() else 0.0
        if change >= window.target:
            break
        strength *= np.float32(1.3)
    # Covering the product's own structure may change too much: then make the texture transparent.
    if change > window.target:
        layer = window.pixels + np.float32(window.target / change) * (layer - window.pixels)
    return layer, cover


def _missing(window: Window) -> Painted:
    """A missing part: filled with the background if there is one, else with its surroundings."""
    rng, side = window.rng, window.side
    cover = (
        blob(rng, side, window.extent, 1.5, rough=0.12)
        if rng.random() < 0.6
        else rectangle(rng, side, window.extent, 1.5)
    )
    grain = np.repeat(rng.standard_normal((side, side, 1), dtype=np.float32), 3, axis=2)
    if window.ground.surface is not None and rng.random() < 0.7:
        layer = window.ground.background(window.top, window.left, side, side)
        return np.clip(layer + np.float32(window.ground.grain) * grain, 0.0, 255.0), cover
    hole = cover > 0.02
    if hole.all():
        return window.pixels, cover
    nearest = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    smooth = max(1.0, window.extent / 14)
    layer = ndimage.gaussian_filter(window.pixels[nearest[0], nearest[1]], (smooth, smooth, 0))
    fine = window.pixels - ndimage.gaussian_filter(window.pixels, (1.0, 1.0, 0))
    around = float(np.median(np.abs(fine[~hole]))) * 1.48
    return np.clip(layer + np.float32(around) * grain, 0.0, 255.0), cover


def _spot(window: Window) -> Painted:
    """A stain: one or a few soft drops that colour the surface and keep its structure."""
    rng, side = window.rng, window.side
    feather = max(1.5, 0.08 * window.extent)
    cover = blob(rng, side, window.extent, feather, rough=0.1)
    return _shifted(window, cover, _tint(window)), cover


def _blur(window: Window) -> Painted:
    """A spot where the image is out of focus."""
    cover = blob(window.rng, window.side, window.extent, max(1.5, 0.05 * window.extent), rough=0.1)
    sigma = float(np.clip(window.extent * window.rng.uniform(0.06, 0.16), 1.2, 12.0))
    return ndimage.gaussian_filter(window.pixels, (sigma, sigma, 0)), cover


PAINTERS: dict[str, Callable[[Window], Painted]] = {
    "cut-paste": _cut_paste,
    "scratch": _scratch,
    "texture": _texture,
    "missing part": _missing,
    "spot": _spot,
    "blur": _blur,
}
"""Painters by the name of the kind; `spot` is coloured where the frame has colour."""
