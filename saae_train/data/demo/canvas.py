"""What every drawn category shares: random streams, poses, soft shapes, light, camera and change masks.

All drawing happens in float32 grey levels (0 .. 255). A scene is drawn twice with the same random
state, once clean and once damaged; the camera (blur, noise) is shared, so that the two pictures
differ in the damage alone and the mask is what really changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from saae_runtime.geometry import resize_matrix, upsample_map

__all__ = [
    "F32",
    "NOISE_SIGMA",
    "REFERENCE",
    "Camera",
    "Flaw",
    "Pose",
    "Streams",
    "change_mask",
    "curve",
    "drawn_size",
    "light",
    "reduce_to",
    "smoothstep",
    "soft_noise",
    "streams",
    "stroke",
    "to_uint8",
    "wobble",
]

F32 = NDArray[np.float32]

REFERENCE = 512.0
"""Drawings are laid out in units of 1/512 of the picture's shorter side."""

MIN_DRAWN = 384
"""Below this many pixels the weave would alias, so smaller pictures are drawn larger and reduced."""

NOISE_SIGMA = 1.6
"""Sensor noise in grey levels (standard deviation at mid grey)."""

VISIBLE_CHANGE = 3.0 * NOISE_SIGMA
"""A pixel counts as changed when damage moves its noise-free value by more than three noise sigmas."""


@dataclass(frozen=True)
class Streams:
    """Independent random streams of one picture, so that damage never disturbs what lies around it."""

    scene: np.random.Generator
    defect: np.random.Generator
    camera: np.random.Generator


def streams(*key: int) -> Streams:
    """Return the streams of the picture named by `key` (seed, category, split, index ...)."""
    scene, defect, camera = np.random.SeedSequence(key).spawn(3)
    return Streams(*(np.random.Generator(np.random.PCG64(s)) for s in (scene, defect, camera)))


def drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in which a picture of `size` is drawn before it is reduced."""
    factor = max(1.0, MIN_DRAWN / min(size))
    return round(size[0] * factor), round(size[1] * factor)


@dataclass(frozen=True)
class Flaw:
    """One defect of a kind (its drawing knows which) around the object point (u, v), turned by `angle`."""

    kind: str
    u: float
    v: float
    length: float
    width: float
    angle: float
    seed: int


@dataclass(frozen=True)
class Pose:
    """Where the object lies: object units (u across, v along) to pixels by scale, rotation and shift."""

    shape: tuple[int, int]
    scale: float
    angle: float
    centre: tuple[float, float]

    def grid(self) -> tuple[F32, F32]:
        """Return u and v of every pixel centre, float32 H x W each."""
        height, width = self.shape
        x = np.arange(width, dtype=np.float32)[None, :] - np.float32(self.centre[0])
        y = np.arange(height, dtype=np.float32)[:, None] - np.float32(self.centre[1])
        cos, sin = np.float32(np.cos(self.angle) / self.scale), np.float32(np.sin(self.angle) / self.scale)
        return x * cos + y * sin, y * cos - x * sin

    def pixel(self, u: float, v: float) -> tuple[float, float]:
        """Return the pixel (x, y) of the object point (u, v)."""
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        return (
            self.centre[0] + self.scale * (u * cos - v * sin),
            self.centre[1] + self.scale * (u * sin + v * cos),
        )

    def window(self, u: float, v: float, radius: float) -> tuple[slice, slice] | None:
        """Return the rows and columns within `radius` units of (u, v), None if outside the picture."""
        x, y = self.pixel(u, v)
        reach = radius * self.scale + 2.0
        top, bottom = max(0, int(y - reach)), min(self.shape[0], int(y + reach) + 1)
        left, right = max(0, int(x - reach)), min(self.shape[1], int(x + reach) + 1)
        if top >= bottom or left >= right:
            return None
        return slice(top, bottom), slice(left, right)


def smoothstep(low: float, high: float, x: F32) -> F32:
    """Return 0 below `low`, 1 above `high` and a smooth cubic between, elementwise."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)


def soft_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> F32:
    """Return smooth noise of unit strength whose blobs are about `cell` pixels wide, float32 H x W."""
    rows, cols = (max(2, int(np.ceil(n / cell)) + 1) for n in shape)
    coarse = rng.standard_normal((rows, cols), dtype=np.float32)
    # Bilinear interpolation shows its lattice; a small blur at the coarse size hides it.
    coarse = ndimage.gaussian_filter(coarse, 0.6, mode="nearest") * np.float32(1.9)
    return upsample_map(coarse, shape)


def wobble(rng: np.random.Generator, count: int, length: float, waves: tuple[float, ...], amount: float) -> F32:
    """Return `count` samples of a gently wavering line over `length` units, float32, peak about `amount`."""
    t = np.linspace(0.0, length, count, dtype=np.float32)
    out = np.zeros(count, np.float32)
    for period in waves:
        phase, weight = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.4, 1.0)
        out += np.float32(weight) * np.sin(t * np.float32(2.0 * np.pi / period) + np.float32(phase))
    return out * np.float32(amount / max(1, len(waves)))


def stroke(shape: tuple[int, int], points: list[tuple[float, float]], width: float) -> F32:
    """Return the coverage (0 .. 1, float32 H x W) of a line through pixel `points`, antialiased."""
    fine = 4
    sheet = Image.new("L", (shape[1] * fine, shape[0] * fine), 0)
    draw = ImageDraw.Draw(sheet)
    scaled = [((x + 0.5) * fine, (y + 0.5) * fine) for x, y in points]
    pen = max(1, round(width * fine))
    draw.line(scaled, fill=255, width=pen, joint="curve")
    radius = pen / 2.0
    for x, y in (scaled[0], scaled[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(sheet.reduce(fine), dtype=np.float32) / np.float32(255.0)


def curve(
    rng: np.random.Generator, start: tuple[float, float], heading: float, length: float, curl: float, steps: int = 40
) -> list[tuple[float, float]]:
    """Return points of a loose thread that starts at `start` and wanders with smooth random curvature."""
    x, y = start
    points = [(x, y)]
    turn = 0.0
    step = length / steps
    for _ in range(steps):
        turn = 0.85 * turn + rng.normal(0.0, curl)
        heading += turn * step / 10.0
        x, y = x + step * float(np.cos(heading)), y + step * float(np.sin(heading))
        points.append((x, y))
    return points


def light(rng: np.random.Generator, shape: tuple[int, int], gain: float = 0.045) -> F32:
    """Return the light over the picture (about 1, float32 H x W): overall gain, a slope and a vignette."""
    y = np.linspace(-1.0, 1.0, shape[0], dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, shape[1], dtype=np.float32)[None, :]
    level = np.float32(1.0 + float(np.clip(rng.normal(0.0, gain), -2.2 * gain, 2.2 * gain)))
    slope_x, slope_y = (np.float32(v) for v in rng.uniform(-0.05, 0.05, 2))
    fall = np.float32(rng.uniform(0.03, 0.08))
    return np.asarray(level * (1.0 + slope_x * x + slope_y * y) * (1.0 - fall * (x * x + y * y)), dtype=np.float32)


@dataclass(frozen=True)
class Camera:
    """One exposure: blur width and the noise pattern, shared by the clean and the damaged drawing."""

    blur: float
    noise: F32

    @classmethod
    def take(cls, rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Camera:
        """Draw the camera's state for a picture of `shape` (H x W or H x W x 3)."""
        blur = float(rng.uniform(0.45, 0.8)) * scale
        return cls(blur, rng.standard_normal(shape, dtype=np.float32))

    def focus(self, drawing: F32) -> F32:
        """Return the noise-free picture: the drawing through the lens, float32."""
        sigma = (self.blur, self.blur) + (0.0,) * (drawing.ndim - 2)
        return ndimage.gaussian_filter(drawing, sigma, mode="nearest")

    def expose(self, picture: F32) -> F32:
        """Return the picture with shot and read noise, float32, not yet rounded."""
        level = np.clip(picture, 0.0, 255.0)
        sigma = np.float32(NOISE_SIGMA) * np.sqrt(np.float32(0.4) + np.float32(1.2 / 255.0) * level)
        return np.asarray(level + sigma * self.noise, dtype=np.float32)


def reduce_to(picture: F32, size: tuple[int, int]) -> F32:
    """Return `picture` (float32 H x W or H x W x 3) reduced to `size` with the toolkit's own resize."""
    if picture.shape[:2] == tuple(size):
        return picture
    rows, cols = resize_matrix(picture.shape[0], size[0]), resize_matrix(picture.shape[1], size[1])
    if picture.ndim == 2:
        return np.asarray(rows @ picture @ cols.T, dtype=np.float32)
    return np.stack([reduce_to(picture[..., c], size) for c in range(picture.shape[2])], axis=-1)


def to_uint8(picture: F32) -> NDArray[np.uint8]:
    """Return grey levels rounded and clipped to uint8."""
    return np.clip(np.rint(picture), 0.0, 255.0).astype(np.uint8)


def change_mask(clean: F32, damaged: F32) -> NDArray[np.bool_]:
    """Return where two noise-free pictures differ visibly, bool H x W.

    Changed texture crosses its old value here and there; a closing of two pixels fills those
    pinholes, and changes of less than 12 connected pixels (nobody could see them) are dropped.
    """
    change = np.abs(damaged - clean)
    if change.ndim == 3:
        change = change.max(axis=2)
    changed = ndimage.binary_closing(np.pad(change > VISIBLE_CHANGE, 3), np.ones((5, 5), bool))[3:-3, 3:-3]
    labels, count = ndimage.label(changed, np.ones((3, 3), bool))
    if count == 0:
        return np.asarray(changed, dtype=np.bool_)
    area = np.bincount(labels.ravel())
    keep = area >= 12
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)
