"""The drawn product `zipper`: a dark woven tape on a light table, closed by two rows of metal teeth.

A zipper is first a plain description (`Zipper`: tapes, teeth, damage) and then a drawing of it.
Lengths are object units, 1/512 of the picture's shorter side; u runs across (0 at the chain,
left negative), v runs along the chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .canvas import F32, REFERENCE, Flaw, Pose, curve, drawn_size, light, smoothstep, soft_noise, stroke, wobble

__all__ = ["CORD", "PITCH", "TAPE_EDGE", "Notch", "Pull", "Tooth", "Zipper", "draw", "make"]

PITCH = 19.0
"""Distance between two teeth of one row."""

TOOTH_LENGTH = 39.0
TOOTH_WIDTH = 9.4
TOOTH_ROOT = 32.0
"""Teeth grip the tape's cord at this distance from the chain's middle."""

TAPE_EDGE = 171.0
"""Half the zipper's width: where the tape ends and the table begins."""

TAPE_INNER = 9.0
CORD = 27.0
COLUMN = 9.0
THREAD = 6.6


@dataclass(frozen=True)
class Tooth:
    """One tooth.

    Attributes:
        side: its row, -1 left, +1 right.
        v: its position along the zipper; du: its shift across; tilt: its rotation.
        length, width: its size.
        gain: its brightness.
        rough: 0, or the seed of a torn, scratched surface.
    """

    side: int
    v: float
    du: float = 0.0
    tilt: float = 0.0
    length: float = TOOTH_LENGTH
    width: float = TOOTH_WIDTH
    gain: float = 1.0
    rough: int = 0


@dataclass(frozen=True)
class Pull:
    """A stretch of one tape drawn sideways: at most `amount` outwards (negative: inwards) around `v`."""

    side: int
    v: float
    half: float
    amount: float
    reach: float = 70.0

    def at(self, v: F32) -> F32:
        """Return the displacement at each `v`, zero outside the stretch."""
        t = np.clip(1.0 - np.abs(v - np.float32(self.v)) / np.float32(self.half), 0.0, 1.0)
        return np.asarray(np.float32(self.amount) * t * t * (3.0 - 2.0 * t), dtype=np.float32)


@dataclass(frozen=True)
class Notch:
    """A torn piece of a tape's outer border, with fibres sticking out."""

    side: int
    v: float
    half: float
    depth: float
    seed: int


@dataclass(frozen=True)
class Zipper:
    """Everything that one picture shows; the arrays are lookup tables of the drawing."""

    pose: Pose
    teeth: tuple[Tooth, ...]
    base: float
    metal: float
    table: float
    weave_phase: float
    thread_gain: F32
    edges: dict[int, F32]
    cloudiness: F32
    fibre: F32
    ground: F32
    lighting: F32
    span: float
    pulls: tuple[Pull, ...] = ()
    notches: tuple[Notch, ...] = ()
    wounds: tuple[Flaw, ...] = field(default=())  # of the fabric: scuff, slit or snag

    def damaged(self, **changes: object) -> Zipper:
        """Return the same zipper with some of its description changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def make(rng: np.random.Generator, size: tuple[int, int]) -> Zipper:
    """Return a flawless zipper as one photograph finds it: every picture another pose, light and cloth."""
    shape = drawn_size(size)
    scale = min(shape) / REFERENCE * float(rng.uniform(0.985, 1.015))
    pose = Pose(
        shape,
        scale,
        float(np.radians(np.clip(rng.normal(0.0, 0.5), -1.4, 1.4))),
        (
            shape[1] / 2.0 + scale * float(np.clip(rng.normal(0.0, 3.0), -8.0, 8.0)),
            shape[0] / 2.0 + scale * float(rng.uniform(0.0, PITCH)),
        ),
    )
    span = shape[0] / scale + 60.0
    rows = int(span / 2.0 / PITCH) + 2
    teeth = [
        Tooth(
            side,
            (k + 0.25 * side) * PITCH + float(rng.normal(0.0, 0.28)),
            du=float(rng.normal(0.0, 0.35)),
            tilt=float(np.radians(rng.normal(0.0, 0.9))),
            length=TOOTH_LENGTH + float(rng.normal(0.0, 0.35)),
            gain=float(np.clip(rng.normal(1.0, 0.06), 0.85, 1.15)),
        )
        for k in range(-rows, rows + 1)
        for side in (-1, 1)
    ]
    teeth.sort(key=lambda tooth: tooth.v)
    return Zipper(
        pose=pose,
        teeth=tuple(teeth),
        base=float(rng.uniform(52.0, 62.0)),
        metal=float(rng.uniform(0.95, 1.06)),
        table=float(rng.uniform(196.0, 210.0)),
        weave_phase=float(rng.uniform(0.0, THREAD)),
        thread_gain=np.clip(rng.normal(1.0, 0.11, (512, 64)), 0.7, 1.3).astype(np.float32),
        edges={side: wobble(rng, 512, span, (310.0, 97.0, 23.0), 2.2) for side in (-1, 1)},
        cloudiness=soft_noise(rng, shape, 46.0 * scale),
        fibre=rng.standard_normal(shape, dtype=np.float32),
        ground=soft_noise(rng, shape, 5.0 * scale),
        lighting=light(rng, shape),
        span=span,
    )


def draw(zipper: Zipper) -> F32:
    """Return the zipper's drawing before lens and noise: grey levels, float32 H x W."""
    u, v = zipper.pose.grid()
    picture = np.empty(zipper.pose.shape, np.float32)
    shift = {side: _pull(zipper, side, v) for side in (-1, 1)}
    ground = zipper.table * (1.0 + 0.008 * zipper.ground)
    left = u < (shift[1] - shift[-1]) * np.float32(0.5)
    side = np.where(left, np.float32(-1.0), np.float32(1.0))
    away = np.where(left, shift[-1], shift[1])
    distance = np.abs(u) if not zipper.pulls else np.asarray(u * side, dtype=np.float32)

    # Cloth follows the pull near the chain and stays put further out.
    cloth = distance
    if zipper.pulls:
        reach = max(p.reach for p in zipper.pulls)
        cloth = distance - away * (1.0 - smoothstep(0.0, reach, distance - CORD))
    edge = _edge(zipper, left, v)

    picture[:] = ground * _table_shadow(distance - edge)
    inside = np.clip((edge - distance) * zipper.pose.scale + 0.5, 0.0, 1.0)
    fabric = _fabric(zipper, cloth, v, left, edge)
    fabric = _wound(zipper, fabric, ground, u, v)
    picture += inside * (fabric - picture)
    if zipper.notches:
        picture = _fray(zipper, picture)

    # Between the tapes it is dark while the chain is closed; an open chain shows the table in shadow.
    gap = smoothstep(TAPE_INNER + 1.0, TAPE_INNER - 1.0 - 1e-3, cloth)
    opening = smoothstep(5.0, 16.0, shift[-1] + shift[1])
    behind = 16.0 + opening * (0.62 * ground - 16.0)
    picture += gap * (behind - picture)

    for tooth in zipper.teeth:
        _paint_shadow(zipper, picture, u, v, tooth)
    for tooth in zipper.teeth:
        _paint_tooth(zipper, picture, u, v, tooth)
    return np.asarray(picture * zipper.lighting, dtype=np.float32)


def _pull(zipper: Zipper, side: int, v: F32) -> F32:
    total = np.zeros((1, 1), np.float32)
    for pull in zipper.pulls:
        if pull.side == side:
            total = total + pull.at(v)
    return np.broadcast_to(total, zipper.pose.shape)


def _edge(zipper: Zipper, left: F32, v: F32) -> F32:
    """Distance of the tape's outer border from the middle, per pixel, with the torn places taken out."""
    index = np.clip((v + np.float32(zipper.span / 2.0)) * np.float32(511.0 / zipper.span), 0.0, 511.0).astype(np.int32)
    edges = dict(zipper.edges)
    along = np.linspace(-zipper.span / 2.0, zipper.span / 2.0, 512, dtype=np.float32)
    for notch in zipper.notches:
        rng = np.random.Generator(np.random.PCG64(notch.seed))
        t = np.clip(1.0 - np.abs(along - notch.v) / notch.half, 0.0, 1.0)
        ragged = 1.0 + 0.55 * np.repeat(rng.standard_normal(256), 2)[:512] * 0.5
        edges[notch.side] = edges[notch.side] - (notch.depth * np.minimum(1.0, 2.2 * t) * ragged).astype(np.float32)
    return np.asarray(TAPE_EDGE + np.where(left, edges[-1][index], edges[1][index]), dtype=np.float32)


def _table_shadow(outside: F32) -> F32:
    fall = np.exp(-np.clip(outside, 0.0, 60.0) * np.float32(1.0 / 7.0))
    return np.asarray(1.0 - 0.42 * fall, dtype=np.float32)


def _fabric(zipper: Zipper, cloth: F32, v: F32, left: F32, edge: F32) -> F32:
    """The tape: columns of slanting threads (a herringbone weave), a thick cord at the teeth, a hem outside."""
    column = cloth * np.float32(1.0 / COLUMN)
    index = np.floor(column)
    across = column - index
    slant = np.where((index.astype(np.int32) & 1) == 0, np.float32(0.62), np.float32(-0.62))
    along = (v + np.float32(zipper.weave_phase)) * np.float32(1.0 / THREAD) + slant * (across - 0.5)
    thread = np.floor(along)
    within = along - thread
    ridge = np.sqrt(np.clip(4.0 * across * (1.0 - across), 0.02, 1.0))
    round_ = np.sqrt(np.clip(4.0 * within * (1.0 - within), 0.0, 1.0))
    jitter = zipper.thread_gain[thread.astype(np.int32) & 511, (index.astype(np.int32) + np.where(left, 0, 32)) & 63]
    tone = (0.30 + 0.85 * ridge * round_ + 0.16 * (0.5 - within)) * jitter
    # The cord under the teeth's roots bulges towards the light; the hem is folded double and lies higher.
    bulge = np.clip(1.0 - np.abs(cloth - np.float32(CORD + 9.0)) / 11.0, 0.0, 1.0)
    hem = smoothstep(17.0, 15.0, edge - cloth)
    hem_line = np.clip(1.0 - np.abs(edge - cloth - 17.0) / 2.2, 0.0, 1.0)
    rim = np.clip(1.0 - (edge - cloth) / 5.0, 0.0, 1.0)
    stitch = _stitches(zipper, cloth, v)
    tone = tone * (1.0 + 0.22 * bulge + 0.10 * hem - 0.32 * hem_line - 0.28 * rim)
    tone = tone * (1.0 + 0.06 * zipper.cloudiness + 0.07 * zipper.fibre)
    valley = smoothstep(CORD + 2.0, CORD - 12.0, cloth)
    return np.asarray(zipper.base * (tone * (1.0 - 0.65 * valley) + stitch), dtype=np.float32)


def _stitches(zipper: Zipper, cloth: F32, v: F32) -> F32:
    """Two seams beside the cord: short slanting stitches, lighter than the cloth."""
    out = np.zeros_like(cloth)
    for place in (CORD + 24.0, CORD + 31.0):
        beat = (v + np.float32(0.35) * (cloth - np.float32(place)) + np.float32(zipper.weave_phase * 3.0)) / 11.0
        beat = beat - np.floor(beat)
        body = np.clip(1.3 - np.abs(beat - 0.5) * 3.2, 0.0, 1.0)
        line = np.clip(1.0 - ((cloth - np.float32(place)) / 2.3) ** 2, 0.0, 1.0)
        out += np.float32(0.55) * body * line
    return out


def _wound(zipper: Zipper, fabric: F32, ground: F32, u: F32, v: F32) -> F32:
    scale = zipper.pose.scale
    for wound in zipper.wounds:
        window = zipper.pose.window(wound.u, wound.v, wound.length + wound.width + 14.0)
        if window is None:
            continue
        rng = np.random.Generator(np.random.PCG64(wound.seed))
        x, y = u[window] - np.float32(wound.u), v[window] - np.float32(wound.v)
        cos, sin = np.float32(np.cos(wound.angle)), np.float32(np.sin(wound.angle))
        along, across = x * cos + y * sin, y * cos - x * sin
        ragged = soft_noise(rng, along.shape, 4.0 * scale)
        fine = rng.standard_normal(along.shape, dtype=np.float32)
        radius = np.sqrt((along / np.float32(wound.length)) ** 2 + (across / np.float32(wound.width)) ** 2)
        patch = fabric[window]
        if wound.kind == "scuff":
            # Rubbed cloth: the ribs are gone, pale broken fibres stand up.
            worn = smoothstep(1.05, 0.65, radius + 0.16 * ragged)
            pile = zipper.base * (1.55 + 0.30 * ragged + 0.34 * fine)
            patch += worn * 0.85 * (pile - patch)
        elif wound.kind == "slit":
            # A cut: the table shines through the middle, its lips curl up and catch light.
            lens = np.abs(across) - np.float32(wound.width) * np.clip(
                1.0 - (along / np.float32(wound.length)) ** 2, 0.0, 1.0
            )
            lens = lens + 0.7 * ragged
            lips = smoothstep(1.0, 0.8, np.abs(along) / np.float32(wound.length))
            patch += lips * smoothstep(4.5, 1.0, lens) * zipper.base * (0.75 + 0.25 * ragged)
            patch += lips * smoothstep(0.6, -0.9, lens) * (0.60 * ground[window] - patch)
            patch *= 1.0 - 0.6 * lips * smoothstep(1.2, 0.0, np.abs(lens - 0.4))
        else:
            # A snag: one thread pulled tight, its row puckered into a bright ridge between dark folds.
            inside = smoothstep(1.0, 0.75, np.abs(along) / np.float32(wound.length))
            bow = np.float32(2.0) * np.sin(along * np.float32(0.09 / 1.0) + np.float32(wound.seed % 7))
            ridge = np.exp(-(((across - bow) / 2.3) ** 2))
            fold = np.exp(-(((np.abs(across - bow) - 6.0) / 3.0) ** 2))
            patch *= 1.0 + inside * (1.6 * ridge * (1.0 + 0.25 * ragged) - 0.55 * fold)
    return fabric


def _fray(zipper: Zipper, picture: F32) -> F32:
    """Fibres hanging out of the torn border, over the table."""
    for notch in zipper.notches:
        rng = np.random.Generator(np.random.PCG64([notch.seed, 1]))
        outward = zipper.pose.angle + (np.pi if notch.side < 0 else 0.0)
        for _ in range(int(rng.integers(9, 17))):
            v = notch.v + float(rng.uniform(-0.9, 0.9)) * notch.half
            near = 1.0 - abs(v - notch.v) / notch.half
            u = notch.side * (TAPE_EDGE - notch.depth * min(1.0, 1.8 * near) - 4.0)
            length = float(rng.uniform(0.5, 1.35)) * (notch.depth + 9.0) * zipper.pose.scale
            heading = outward + float(rng.normal(0.0, 0.5))
            points = curve(rng, zipper.pose.pixel(u, v), heading, length, 0.22, steps=16)
            cover = stroke(zipper.pose.shape, points, float(rng.uniform(0.7, 1.5)) * zipper.pose.scale)
            tone = zipper.base * float(rng.uniform(0.5, 1.1))
            picture = picture + np.float32(0.9) * cover * (np.float32(tone) - picture)
    return picture


def _placed(zipper: Zipper, tooth: Tooth) -> tuple[float, float, float]:
    """Where a tooth's root is and how it leans once its tape is pulled: (u, v, tilt)."""
    away, lean = 0.0, 0.0
    for pull in zipper.pulls:
        if pull.side == tooth.side:
            here, beyond = pull.at(np.array([tooth.v, tooth.v + 1.0], np.float32))
            away += float(here)
            lean += float(beyond - here)
    return tooth.side * (TOOTH_ROOT + away + tooth.du), tooth.v, tooth.tilt - 0.9 * tooth.side * float(np.arctan(lean))


def _tooth_frame(
    zipper: Zipper, u: F32, v: F32, tooth: Tooth, offset: tuple[float, float], grow: float
) -> tuple[tuple[slice, slice], F32, F32] | None:
    """Window of the tooth, distance along it from its root (towards the chain) and across it."""
    root_u, root_v, tilt = _placed(zipper, tooth)
    root_u, root_v = root_u + offset[0], root_v + offset[1]
    middle = root_u - tooth.side * tooth.length / 2.0
    window = zipper.pose.window(middle, root_v, tooth.length / 2.0 + grow)
    if window is None:
        return None
    # A tooth is long and thin: only the rows near it matter.
    _, y = zipper.pose.pixel(middle, root_v)
    lean = abs(np.sin(zipper.pose.angle)) + abs(np.sin(tilt))
    half = zipper.pose.scale * (tooth.width / 2.0 + grow + 0.6 * tooth.length * lean) + 2.0
    window = (slice(max(0, int(y - half)), max(0, min(zipper.pose.shape[0], int(y + half) + 1))), window[1])
    x, y_ = u[window] - np.float32(root_u), v[window] - np.float32(root_v)
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    return window, -np.float32(tooth.side) * (x * cos + y_ * sin), y_ * cos - x * sin


def _half_width(tooth: Tooth, along: F32) -> F32:
    """Half the tooth's width along its length: legs on the cord, a waist, a broad head."""
    t = along * np.float32(1.0 / tooth.length)
    head = smoothstep(0.50, 0.72, t)
    leg = smoothstep(0.34, 0.12, t)
    return np.asarray(np.float32(tooth.width / 2.0) * (0.80 + 0.26 * head + 0.22 * leg), dtype=np.float32)


def _outline(tooth: Tooth, along: F32, across: F32) -> tuple[F32, F32]:
    """Signed distance to the tooth's outline (negative inside) and the half width used."""
    half = _half_width(tooth, along)
    if tooth.rough:
        rng = np.random.Generator(np.random.PCG64(tooth.rough))
        teeth = rng.standard_normal(64).astype(np.float32)
        index = np.clip((along + 6.0) * np.float32(1.1), 0, 62).astype(np.int32)
        half = half + np.where(across > 0.0, teeth[index], teeth[index + 1]) * np.float32(0.7)
    corner = np.float32(3.2)
    dx = np.abs(along - np.float32(tooth.length / 2.0)) - np.float32(tooth.length / 2.0) + corner
    dy = np.abs(across) - half + corner
    outside = np.sqrt(np.maximum(dx, 0.0) ** 2 + np.maximum(dy, 0.0) ** 2)
    return np.asarray(outside + np.minimum(np.maximum(dx, dy), 0.0) - corner, dtype=np.float32), half


def _paint_shadow(zipper: Zipper, picture: F32, u: F32, v: F32, tooth: Tooth) -> None:
    frame = _tooth_frame(zipper, u, v, tooth, (1.6, 2.2), 7.0)
    if frame is None:
        return
    window, along, across = frame
    distance, _ = _outline(replace(tooth, rough=0), along, across)
    picture[window] *= 1.0 - 0.5 * smoothstep(3.6, -1.5, distance)


def _paint_tooth(zipper: Zipper, picture: F32, u: F32, v: F32, tooth: Tooth) -> None:
    frame = _tooth_frame(zipper, u, v, tooth, (0.0, 0.0), 3.0)
    if frame is None:
        return
    window, along, across = frame
    distance, half = _outline(tooth, along, across)
    cover = np.clip(0.5 - distance * np.float32(zipper.pose.scale), 0.0, 1.0)

    # Pressed metal: flat on top, rounded at the rim; light falls from above left.
    bank = np.clip(across / np.maximum(half, 0.5), -1.0, 1.0)
    n_across = np.sign(bank) * bank * bank * np.float32(0.92)
    n_along = smoothstep(-6.5, 0.0, along - np.float32(tooth.length)) * np.float32(0.75)
    n_along = n_along - smoothstep(4.5, 0.0, along) * np.float32(0.7)
    n_up = np.sqrt(np.clip(1.0 - n_across * n_across - n_along * n_along, 0.05, 1.0))
    toward = -np.float32(tooth.side)
    lit = n_across * np.float32(-0.62) + n_along * toward * np.float32(-0.38) + n_up * np.float32(0.68)
    gloss = np.clip(lit * np.float32(1.04), 0.0, 1.0)
    gloss2 = gloss * gloss
    gloss8 = gloss2 * gloss2 * gloss2 * gloss2
    tone = 36.0 + 92.0 * np.clip(lit, 0.0, 1.0) + 125.0 * gloss8 * gloss8

    # The crimp over the cord, and the cup pressed into the head.
    t = along * np.float32(1.0 / tooth.length)
    crimp = np.exp(-(((t - 0.30) / 0.045) ** 2))
    cup = smoothstep(1.25, 0.55, np.sqrt(((t - 0.80) / 0.11) ** 2 + (across / np.float32(2.5)) ** 2))
    tone = tone * (1.0 - 0.45 * crimp - 0.38 * cup)
    tone = tone * (1.0 + np.float32(0.035) * zipper.fibre[window])
    if tooth.rough:
        rng = np.random.Generator(np.random.PCG64([tooth.rough, 2]))
        scratch = soft_noise(rng, along.shape, 2.2 * zipper.pose.scale)
        tone = tone * (0.94 + 0.24 * scratch) + 22.0 * np.maximum(scratch - 1.0, 0.0)
    tone = tone * np.float32(tooth.gain * zipper.metal)
    patch = picture[window]
    patch += cover * (tone - patch)
