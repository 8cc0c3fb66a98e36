"""The self-test as a chart: share of simulated defects found by size and contrast, one panel per kind."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.render import font_of_size

from ..evaluation.share import Share
from .result import SelfTest
from .simulate import CONTRASTS, SIZES

__all__ = ["chart"]

_WIDTH, _HEIGHT, _ACROSS = 330, 236, 4
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEAD = 46, 14, 34, 52, 40
_INK, _SOFT, _GRID, _PAPER = (29, 33, 41), (91, 100, 114), (225, 228, 232), (255, 255, 255)
_SIZE, _CONTRAST = (58, 110, 168), (200, 68, 47)


def chart(result: SelfTest) -> NDArray[np.uint8]:
    """Draw the result: in each panel the share found by size (left) and by contrast (right), with 95 % intervals.

    Returns:
        uint8 height x width x 3 RGB, for `saae_runtime.render.save_png`.
    """
    from PIL import Image, ImageDraw

    panels: list[str | None] = [None, *result.kinds]
    rows = -(-len(panels) // _ACROSS)
    across = min(_ACROSS, len(panels))
    page = Image.new("RGB", (max(across, 2) * _WIDTH, _HEAD + rows * _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(page)
    on = "synthetic images" if result.synthetic else "normal images"
    pen.text((14, 10), f"SIMULATED defects on {on}: share found", fill=_INK, font=font_of_size(18))
    for index, kind in enumerate(panels):
        _panel(pen, result, kind, index % _ACROSS * _WIDTH, _HEAD + index // _ACROSS * _HEIGHT)
    return np.asarray(page)


def _panel(pen: Any, result: SelfTest, kind: str | None, x: int, y: int) -> None:
    left, right, top, floor = x + _LEFT, x + _WIDTH - _RIGHT, y + _TOP, y + _HEIGHT - _BOTTOM
    small = font_of_size(11)
    whole = result.share(kind)
    pen.text((left, y + 8), f"{kind or 'all kinds'}: {whole}", fill=_INK, font=font_of_size(14))
    for percent in (0, 50, 100):
        level = floor - (floor - top) * percent / 100
        pen.line((left, level, right, level), fill=_GRID)
        pen.text((left - 6, level), f"{percent} %", fill=_SOFT, font=small, anchor="rm")
    groups = (
        ([result.share(kind, size=name) for name in SIZES], list(SIZES), _SIZE, "size"),
        ([result.share(kind, contrast=name) for name in CONTRASTS], list(CONTRASTS), _CONTRAST, "contrast"),
    )
    half = (right - left) / 2
    for number, (shares, names, color, title) in enumerate(groups):
        start = left + number * half
        places = [start + half * (slot + 0.5) / len(names) for slot in range(len(names))]
        drawn = [(at, _height(share, floor, top)) for at, share in zip(places, shares, strict=True) if share.count]
        if len(drawn) > 1:
            pen.line(drawn, fill=color, width=2)
        for at, share, name in zip(places, shares, names, strict=True):
            interval = share.interval
            if interval is not None:
                low, high = (floor - (floor - top) * bound for bound in interval)
                pen.line((at, low, at, high), fill=color)
                level = _height(share, floor, top)
                pen.ellipse((at - 4, level - 4, at + 4, level + 4), fill=color)
            pen.text((at, floor + 6), name, fill=_SOFT, font=small, anchor="ma")
            pen.text((at, floor + 20), f"n {share.count}", fill=_SOFT, font=small, anchor="ma")
        pen.text((start + half / 2, floor + 35), title, fill=color, font=small, anchor="ma")
    pen.line((left + half, top, left + half, floor), fill=_GRID)


def _height(share: Share, floor: float, top: float) -> float:
    return floor - (floor - top) * (share.value or 0.0)
