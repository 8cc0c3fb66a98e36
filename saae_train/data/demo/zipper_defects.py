"""The seven defect types of the zipper category: each takes a flawless zipper and returns it damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .canvas import Flaw
from .zipper import CORD, PITCH, TAPE_EDGE, Notch, Pull, Tooth, Zipper

__all__ = ["DEFECTS", "damage"]

Defect = Callable[[np.random.Generator, Zipper, float], Zipper]

VISIBLE = 190.0
"""Damage is centred within this distance of the picture's middle, so that it is never cut off entirely."""


def broken_teeth(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """One to three neighbouring teeth of a row are missing or snapped off to a stump."""
    side = int(rng.choice((-1, 1)))
    row = sorted((t for t in zipper.teeth if t.side == side), key=lambda t: abs(t.v - v))
    count = int(rng.choice((1, 2, 3), p=(0.3, 0.45, 0.25)))
    lost = set(row[:count])
    teeth: list[Tooth] = []
    for tooth in zipper.teeth:
        if tooth not in lost:
            teeth.append(tooth)
        elif rng.random() < 0.45:
            stump = float(rng.uniform(0.32, 0.55))
            teeth.append(
                replace(tooth, length=tooth.length * stump, rough=int(rng.integers(1, 1 << 30)), gain=tooth.gain * 0.9)
            )
    return zipper.damaged(teeth=tuple(teeth))


def split_teeth(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """The chain has come apart: over a stretch the two rows no longer meet and the table shows between."""
    half = float(rng.uniform(48.0, 105.0))
    amount = float(rng.uniform(11.0, 20.0))
    share = float(rng.uniform(0.35, 0.65))
    pulls = tuple(
        Pull(side, v + float(rng.normal(0.0, 4.0)), half, 2.0 * amount * part, reach=32.0)
        for side, part in ((-1, share), (1, 1.0 - share))
    )
    return zipper.damaged(pulls=zipper.pulls + pulls)


def squeezed_teeth(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """A crushed stretch: teeth bent out of line, pressed against each other and flattened."""
    half = float(rng.uniform(1.3, 2.6)) * PITCH
    side = int(rng.choice((-1, 1)))
    both = rng.random() < 0.45
    lean = float(rng.choice((-1.0, 1.0)))
    teeth = []
    for tooth in zipper.teeth:
        near = 1.0 - abs(tooth.v - v) / half
        if near <= 0.0 or not (both or tooth.side == side):
            teeth.append(tooth)
            continue
        bend = np.radians(lean * float(rng.uniform(9.0, 20.0)) * min(1.0, 2.0 * near) + float(rng.normal(0.0, 3.0)))
        teeth.append(
            replace(
                tooth,
                v=tooth.v + 0.33 * (v - tooth.v) * near + float(rng.normal(0.0, 0.8)),
                du=tooth.du + float(rng.uniform(0.0, 4.5)) * near,
                tilt=tooth.tilt + float(bend),
                width=tooth.width * float(rng.uniform(0.82, 1.25)),
                gain=tooth.gain * float(rng.uniform(0.85, 1.2)),
            )
        )
    teeth.sort(key=lambda t: t.v)
    return zipper.damaged(teeth=tuple(teeth))


def rough(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """Teeth with burrs and a torn, scratched surface along a stretch of the chain."""
    half = float(rng.uniform(1.6, 3.4)) * PITCH
    teeth = tuple(
        replace(tooth, rough=int(rng.integers(1, 1 << 30)), du=tooth.du + float(rng.normal(0.0, 0.8)))
        if abs(tooth.v - v) < half
        else tooth
        for tooth in zipper.teeth
    )
    return zipper.damaged(teeth=teeth)


def fabric_border(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """The tape's outer border is torn, with fibres hanging over the table."""
    notch = Notch(
        side=int(rng.choice((-1, 1))),
        v=v,
        half=float(rng.uniform(13.0, 40.0)),
        depth=float(rng.uniform(7.0, 19.0)),
        seed=int(rng.integers(1, 1 << 30)),
    )
    return zipper.damaged(notches=(*zipper.notches, notch))


def fabric_interior(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """The cloth between chain and border is rubbed, cut or snagged."""
    kind = str(rng.choice(("scuff", "slit", "snag")))
    length = float(rng.uniform(*{"scuff": (13.0, 26.0), "slit": (16.0, 30.0), "snag": (22.0, 42.0)}[kind]))
    width = float(rng.uniform(*{"scuff": (8.0, 17.0), "slit": (2.4, 4.6), "snag": (3.0, 5.0)}[kind]))
    angle = (
        float(rng.uniform(0.0, np.pi)) if kind != "snag" else float(rng.choice((0.0, np.pi / 2)) + rng.normal(0, 0.2))
    )
    across = CORD + 40.0 + length * abs(np.cos(angle))
    limit = TAPE_EDGE - 22.0 - length * abs(np.cos(angle))
    u = float(rng.uniform(min(across, limit), max(across, limit)))
    wound = Flaw(kind, float(rng.choice((-1.0, 1.0))) * u, v, length, width, angle, int(rng.integers(1, 1 << 30)))
    return zipper.damaged(wounds=(*zipper.wounds, wound))


def combined(rng: np.random.Generator, zipper: Zipper, v: float) -> Zipper:
    """Two or three of the other defects in one zipper, at different places."""
    chain = (broken_teeth, split_teeth, squeezed_teeth, rough)
    cloth = (fabric_border, fabric_interior)
    parts: list[Defect] = [chain[int(rng.integers(4))], cloth[int(rng.integers(2))]]
    if rng.random() < 0.5:
        parts.append((*chain, *cloth)[int(rng.integers(6))])
    places = np.linspace(-0.8, 0.8, len(parts)) * VISIBLE + rng.normal(0.0, 12.0, len(parts))
    for part, place in zip(parts, rng.permutation(places), strict=True):
        zipper = part(rng, zipper, float(place))
    return zipper


DEFECTS: dict[str, Defect] = {
    "broken_teeth": broken_teeth,
    "combined": combined,
    "fabric_border": fabric_border,
    "fabric_interior": fabric_interior,
    "rough": rough,
    "split_teeth": split_teeth,
    "squeezed_teeth": squeezed_teeth,
}


def damage(rng: np.random.Generator, zipper: Zipper, name: str) -> Zipper:
    """Return `zipper` with the defect `name` somewhere in view."""
    reach = min(VISIBLE, zipper.pose.shape[0] / zipper.pose.scale / 2.0 - 60.0)
    return DEFECTS[name](rng, zipper, float(rng.uniform(-reach, reach)))
