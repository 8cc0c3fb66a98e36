"""The drawn texture `weave`: a coarse plain-woven cloth that fills the picture, and its four defect types.

Lengths are object units, 1/512 of the picture's shorter side; warp threads run along v, weft along u.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .canvas import F32, REFERENCE, Flaw, Pose, curve, drawn_size, light, smoothstep, soft_noise, stroke

__all__ = ["DEFECTS", "Weave", "damage", "draw", "make"]

YARN = 10.0
"""Distance between neighbouring threads."""

WARP_COLOUR = np.array([172.0, 150.0, 118.0], np.float32)
WEFT_COLOUR = np.array([142.0, 124.0, 100.0], np.float32)
DARK = np.array([24.0, 21.0, 19.0], np.float32)


@dataclass(frozen=True)
class Weave:
    """Everything that one picture shows; the arrays are lookup tables of the drawing."""

    pose: Pose
    phase: tuple[float, float]
    warp_gain: F32
    weft_gain: F32
    drift_u: F32
    drift_v: F32
    slub: F32
    fibre: F32
    lighting: F32
    tint: F32
    flaws: tuple[Flaw, ...] = ()


def make(rng: np.random.Generator, size: tuple[int, int]) -> Weave:
    """Return a flawless piece of cloth: every picture another cut-out, stretch, dye and light."""
    shape = drawn_size(size)
    scale = min(shape) / REFERENCE * float(rng.uniform(0.97, 1.03))
    pose = Pose(shape, scale, float(np.radians(rng.normal(0.0, 1.2))), (shape[1] / 2.0, shape[0] / 2.0))
    return Weave(
        pose=pose,
        phase=(float(rng.uniform(0.0, 2.0 * YARN)), float(rng.uniform(0.0, 2.0 * YARN))),
        warp_gain=np.clip(rng.normal(1.0, 0.055, 256), 0.85, 1.15).astype(np.float32),
        weft_gain=np.clip(rng.normal(1.0, 0.055, 256), 0.85, 1.15).astype(np.float32),
        drift_u=soft_noise(rng, shape, 60.0 * scale) * np.float32(0.9),
        drift_v=soft_noise(rng, shape, 60.0 * scale) * np.float32(0.9),
        slub=soft_noise(rng, shape, 11.0 * scale),
        fibre=rng.standard_normal(shape, dtype=np.float32),
        lighting=light(rng, shape),
        tint=(1.0 + rng.normal(0.0, 0.012, 3)).astype(np.float32),
    )


def draw(weave: Weave) -> F32:
    """Return the cloth's drawing before lens and noise: RGB levels, float32 H x W x 3."""
    u, v = weave.pose.grid()
    u, v = u + weave.drift_u, v + weave.drift_v
    bare = np.zeros(weave.pose.shape, np.float32)
    for flaw in weave.flaws:
        if flaw.kind in ("hole", "cut"):
            u, v, bare = _part_threads(weave, flaw, u, v, bare)
    picture = _cloth(weave, u, v)
    picture += bare[..., None] * (DARK * (1.0 + 0.25 * weave.slub[..., None]) - picture)
    for flaw in weave.flaws:
        if flaw.kind == "stain":
            picture = _stain(weave, flaw, picture)
        elif flaw.kind == "thread":
            picture = _loose_thread(weave, flaw, picture)
        elif flaw.kind == "hole":
            picture = _broken_ends(weave, flaw, picture)
    return np.asarray(picture * weave.tint * weave.lighting[..., None], dtype=np.float32)


def _cloth(weave: Weave, u: F32, v: F32) -> F32:
    x = (u + np.float32(weave.phase[0])) * np.float32(1.0 / YARN)
    y = (v + np.float32(weave.phase[1])) * np.float32(1.0 / YARN)
    column, row = np.floor(x), np.floor(y)
    fx, fy = x - column, y - row
    i, j = column.astype(np.int32), row.astype(np.int32)
    warp_over = ((i + j) & 1) == 0
    across = np.where(warp_over, fx, fy)
    along = np.where(warp_over, fy, fx)
    # A thread on top is round across and dives under its neighbours at both ends of the crossing.
    round_ = np.sqrt(np.clip(4.0 * across * (1.0 - across), 0.0, 1.0))
    dive = np.clip(4.0 * along * (1.0 - along), 0.0, 1.0)
    twist = (along * 3.0 + across * 1.5) % 1.0
    tone = (0.34 + 0.72 * round_ * (0.45 + 0.55 * dive)) * (0.94 + 0.12 * twist)
    tone = tone * (1.0 + np.where(warp_over, 0.10 * (0.5 - fx), 0.16 * (0.5 - fy)))
    gain = np.where(warp_over, weave.warp_gain[i & 255], weave.weft_gain[j & 255])
    tone = tone * gain * (1.0 + 0.055 * weave.slub + 0.045 * weave.fibre)
    colour = np.where(warp_over[..., None], WARP_COLOUR, WEFT_COLOUR)
    return np.asarray(colour * tone[..., None], dtype=np.float32)


def _local(weave: Weave, flaw: Flaw) -> tuple[F32, F32]:
    """Distances from the flaw's middle along and across its own axis, float32 H x W each."""
    u, v = weave.pose.grid()
    x, y = u - np.float32(flaw.u), v - np.float32(flaw.v)
    cos, sin = np.float32(np.cos(flaw.angle)), np.float32(np.sin(flaw.angle))
    return x * cos + y * sin, y * cos - x * sin


def _ragged(flaw: Flaw, shape: tuple[int, int], cell: float) -> F32:
    return soft_noise(np.random.Generator(np.random.PCG64(flaw.seed)), shape, cell)


def _part_threads(weave: Weave, flaw: Flaw, u: F32, v: F32, bare: F32) -> tuple[F32, F32, F32]:
    """Threads pushed aside around a hole or a cut, and how bare the ground lies in its middle (0 .. 1)."""
    along, across = _local(weave, flaw)
    ragged = _ragged(flaw, weave.pose.shape, 5.0 * weave.pose.scale)
    cos, sin = np.float32(np.cos(flaw.angle)), np.float32(np.sin(flaw.angle))
    taper = np.clip(1.0 - (along / np.float32(flaw.length)) ** 2, 0.0, 1.0)
    if flaw.kind == "cut":
        open_ = np.float32(flaw.width) * taper
        push = np.sign(across) * np.float32(0.6) * open_ * np.exp(-np.abs(across) / np.float32(1.3 * flaw.width))
        gap = np.abs(across) - open_ + 0.9 * ragged * smoothstep(0.0, 0.4, taper) + 4.0 * smoothstep(0.12, 0.0, taper)
        u, v = u + push * sin, v - push * cos
    else:
        radius = np.sqrt((along / np.float32(flaw.length)) ** 2 + (across / np.float32(flaw.width)) ** 2)
        push = np.float32(0.45 * flaw.width) * np.exp(-np.clip(radius - 0.6, 0.0, 9.0) * np.float32(2.2))
        norm = np.maximum(np.hypot(along, across), 1.0)
        out_u, out_v = (along * cos - across * sin) / norm, (along * sin + across * cos) / norm
        u, v = u - push * out_u, v - push * out_v
        gap = (radius - 1.0) * np.float32(flaw.width) + 2.2 * ragged
    return u, v, np.maximum(bare, smoothstep(1.0, -1.4, gap))


def _broken_ends(weave: Weave, flaw: Flaw, picture: F32) -> F32:
    rng = np.random.Generator(np.random.PCG64([flaw.seed, 1]))
    for _ in range(int(rng.integers(6, 12))):
        turn = float(rng.uniform(0.0, 2.0 * np.pi))
        u = (
            flaw.u
            + 0.95 * flaw.length * float(np.cos(turn) * np.cos(flaw.angle))
            - 0.95 * flaw.width * float(np.sin(turn) * np.sin(flaw.angle))
        )
        v = (
            flaw.v
            + 0.95 * flaw.length * float(np.cos(turn) * np.sin(flaw.angle))
            + 0.95 * flaw.width * float(np.sin(turn) * np.cos(flaw.angle))
        )
        heading = float(np.arctan2(flaw.v - v, flaw.u - u)) + weave.pose.angle + float(rng.normal(0.0, 0.5))
        length = float(rng.uniform(0.4, 1.1)) * flaw.width * weave.pose.scale
        points = curve(rng, weave.pose.pixel(u, v), heading, length, 0.25, steps=12)
        cover = stroke(weave.pose.shape, points, float(rng.uniform(1.0, 2.6)) * weave.pose.scale)[..., None]
        picture = picture + cover * (WARP_COLOUR * np.float32(rng.uniform(0.5, 0.95)) - picture)
    return picture


def _stain(weave: Weave, flaw: Flaw, picture: F32) -> F32:
    """Liquid soaked in: darker and warmer, darkest at its drying rim."""
    along, across = _local(weave, flaw)
    radius = np.sqrt((along / np.float32(flaw.length)) ** 2 + (across / np.float32(flaw.width)) ** 2)
    radius = radius + 0.22 * _ragged(flaw, weave.pose.shape, 22.0 * weave.pose.scale)
    soaked = smoothstep(1.06, 0.92, radius) * (0.75 + 0.45 * np.exp(-(((radius - 0.93) / 0.09) ** 2)))
    absorb = np.array([0.26, 0.33, 0.42], np.float32)
    return np.asarray(picture * (1.0 - soaked[..., None] * absorb), dtype=np.float32)


def _loose_thread(weave: Weave, flaw: Flaw, picture: F32) -> F32:
    """A foreign thread lying on the cloth, with the shadow it casts."""
    rng = np.random.Generator(np.random.PCG64([flaw.seed, 2]))
    scale = weave.pose.scale
    points = curve(rng, weave.pose.pixel(flaw.u, flaw.v), flaw.angle, flaw.length * scale, 0.12, steps=48)
    width = flaw.width * scale
    shadow = stroke(weave.pose.shape, [(x + 0.6 * width, y + 0.8 * width) for x, y in points], width * 1.3)
    body = stroke(weave.pose.shape, points, width)
    shine = stroke(weave.pose.shape, [(x - 0.18 * width, y - 0.2 * width) for x, y in points], width * 0.35)
    dyes = ((214.0, 208.0, 198.0), (62.0, 66.0, 84.0), (126.0, 58.0, 52.0))
    colour = np.array(dyes[int(rng.integers(3))], np.float32)
    picture = picture * (1.0 - 0.42 * shadow[..., None])
    picture = picture + body[..., None] * (colour * 0.86 - picture)
    return np.asarray(picture + shine[..., None] * 0.5 * (colour * 1.16 - picture), dtype=np.float32)


_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "cut": ((22.0, 52.0), (2.0, 4.2)),
    "hole": ((9.0, 19.0), (8.0, 15.0)),
    "stain": ((22.0, 52.0), (18.0, 38.0)),
    "thread": ((70.0, 190.0), (2.6, 4.2)),
}

DEFECTS: tuple[str, ...] = tuple(sorted(_RANGES))


def damage(rng: np.random.Generator, weave: Weave, name: str) -> Weave:
    """Return `weave` with the defect `name` somewhere in view."""
    lengths, widths = _RANGES[name]
    reach_u, reach_v = (n / weave.pose.scale / 2.0 - 62.0 for n in weave.pose.shape[::-1])
    flaw = Flaw(
        name,
        float(rng.uniform(-reach_u, reach_u)),
        float(rng.uniform(-reach_v, reach_v)),
        float(rng.uniform(*lengths)),
        float(rng.uniform(*widths)),
        float(rng.uniform(0.0, 2.0 * np.pi)),
        int(rng.integers(1, 1 << 30)),
    )
    return replace(weave, flaws=(*weave.flaws, flaw))
