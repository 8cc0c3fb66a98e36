"""Shapes and noise that simulated defects are drawn with: blobs, rectangles, strokes, Perlin noise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["blob", "fade", "perlin", "rectangle", "scratch"]

F32 = NDArray[np.float32]
Random = np.random.Generator


def fade(distance: F32, width: float) -> F32:
    """1 inside, 0 outside, a smooth step of `width` pixels around `distance` = 0 (positive: inside)."""
    t = np.clip(distance / np.float32(max(width, 1e-3)) + np.float32(0.5), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), np.float32)


def _grid(side: int) -> tuple[F32, F32]:
    axis = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
    return np.meshgrid(axis, axis)  # type: ignore[return-value]


def blob(rng: Random, side: int, extent: float, feather: float, rough: float = 0.18) -> F32:
    """An irregular, turned ellipse in the middle of a square.

    Args:
        rng: random stream.
        side: pixels of the square.
        extent: pixels across its longest direction.
        feather: pixels over which the edge fades.
        rough: deviation of the edge from the ellipse, as a share of the radius.

    Returns:
        float32 side x side, coverage in 0..1.
    """
    x, y = _grid(side)
    turn, flat = rng.uniform(0.0, math.pi), rng.uniform(0.55, 1.0)
    u = np.cos(turn) * x + np.sin(turn) * y
    v = (np.cos(turn) * y - np.sin(turn) * x) / flat
    angle = np.arctan2(v, u)
    edge = np.ones_like(angle)
    for waves in (2, 3, 5, 7):
        edge += np.float32(rough * rng.normal() / waves) * np.cos(waves * angle + np.float32(rng.uniform(0, 6.3)))
    edge = np.clip(edge, 0.35, None)
    edge *= np.float32(extent / 2) / edge.max()
    return fade((edge - np.hypot(u, v)) * np.float32(flat), feather)


def rectangle(rng: Random, side: int, extent: float, feather: float) -> F32:
    """A turned rectangle in the middle of a square whose diagonal is `extent`; float32 side x side in 0..1."""
    x, y = _grid(side)
    turn, ratio = rng.uniform(0.0, math.pi), rng.uniform(0.45, 1.0)
    long = extent / math.hypot(1.0, ratio)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    inside = np.minimum(np.float32(long / 2) - np.abs(u), np.float32(ratio * long / 2) - np.abs(v))
    return fade(inside.astype(np.float32), feather)


def scratch(rng: Random, side: int, extent: float, width: float) -> F32:
    """A slightly bent stroke through the middle of a square, thinner at its ends.

    Args:
        rng: random stream.
        side: pixels of the square.
        extent: pixels from end to end.
        width: pixels across at its widest.

    Returns:
        float32 side x side, coverage in 0..1.
    """
    count = max(8, min(200, round(extent)))
    heading = rng.uniform(0.0, 2 * math.pi)
    bend = np.cumsum(rng.normal(0.0, 0.25 / math.sqrt(count), count)) + rng.normal(0.0, 0.5) * np.linspace(
        -0.5, 0.5, count
    )
    steps = np.stack([np.cos(heading + bend), np.sin(heading + bend)], axis=1)
    points = np.cumsum(steps, axis=0)
    points -= (points.min(axis=0) + points.max(axis=0)) / 2
    longest = float(np.linalg.norm(points[-1] - points[0]))
    points = (points * extent / max(longest, 1e-6)).astype(np.float32)
    t = np.linspace(0.0, 1.0, count, dtype=np.float32)
    half = np.float32(width / 2) * (0.35 + 0.65 * np.sin(np.pi * t).clip(0.0) ** np.float32(0.6))
    half *= (1.0 + 0.25 * rng.standard_normal(count, dtype=np.float32)).clip(0.5, 1.5)
    x, y = _grid(side)
    # The middle line as short segments: a pixel's distance to the nearest, less half the width there.
    inside = np.full((side, side), -np.inf, np.float32)
    margin = float(width) + 2.0
    offset = (side - 1) / 2
    for (ax, ay), (bx, by), h in zip(points[:-1], points[1:], half[:-1], strict=True):
        left, right = (
            int(v) for v in np.clip((min(ax, bx) - margin + offset, max(ax, bx) + margin + offset + 1), 0, side)
        )
        top, bottom = (
            int(v) for v in np.clip((min(ay, by) - margin + offset, max(ay, by) + margin + offset + 1), 0, side)
        )
        if left >= right or top >= bottom:
            continue
        px, py = x[top:bottom, left:right] - ax, y[top:bottom, left:right] - ay
        dx, dy = bx - ax, by - ay
        along = np.clip((px * dx + py * dy) / max(float(dx * dx + dy * dy), 1e-9), 0.0, 1.0)
        near = h - np.hypot(px - along * dx, py - along * dy)
        inside[top:bottom, left:right] = np.maximum(inside[top:bottom, left:right], near)
    return fade(inside, 1.0)


def perlin(rng: Random, side: int, cell: float) -> F32:
    """Perlin's gradient noise (1985) on a square, float32 side x side, about -1..1; `cell` is its lattice in pixels."""
    cell = max(float(cell), 1.5)
    count = int(side / cell) + 2
    angle = rng.uniform(0.0, 2 * math.pi, (count + 1, count + 1)).astype(np.float32)
    gx, gy = np.cos(angle), np.sin(angle)
    at = (np.arange(side, dtype=np.float32) + np.float32(rng.uniform(0.0, 1.0))) / np.float32(cell)
    low = np.minimum(at.astype(np.int64), count - 1)
    t = at - low
    ease = t * t * t * (t * (t * 6.0 - 15.0) + 10.0)
    y0, x0 = low[:, None], low[None, :]
    ty, tx = t[:, None], t[None, :]

    def corner(dy: int, dx: int) -> F32:
        return gx[y0 + dy, x0 + dx] * (tx - dx) + gy[y0 + dy, x0 + dx] * (ty - dy)

    top = corner(0, 0) + ease[None, :] * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + ease[None, :] * (corner(1, 1) - corner(1, 0))
    return np.asarray((top + ease[:, None] * (bottom - top)) * np.float32(math.sqrt(2)), np.float32)
