"""The qualitative sheet of the paper's Figure 3: images with ground truth, anomaly map and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saae_runtime import render
from saae_runtime.errors import DataError
from saae_runtime.geometry import resize_frames

__all__ = ["SheetColumn", "qualitative_sheet"]

_UNKNOWN = 128  # gray of a ground truth that is not known


@dataclass(frozen=True)
class SheetColumn:
    """One column: frame uint8 H x W x 3 RGB; truth bool H x W, None if it is not known; anomaly_map float32 H x W."""

    title: str
    frame: NDArray[np.uint8]
    truth: NDArray[np.bool_] | None
    anomaly_map: NDArray[np.float32]


def qualitative_sheet(columns: Sequence[SheetColumn], threshold: float, cell: int = 256) -> NDArray[np.uint8]:
    """Figure 3 of the paper: one column per image; rows input, ground truth, map, segmentation at T.

    Each picture keeps its proportions inside a cell x cell square. T has the same colour in every map. A truth that is
    not known is gray, because black would mean that there is no defect.

    Returns:
        uint8 height x width x 3 RGB, for `saae_runtime.render.save_png`.

    Raises:
        DataError: there is no column.
    """
    if not columns:
        raise DataError("The sheet has no image to show.", "It was given no column.", "choose at least one test image")
    gap, left, top = 6, 104, 26
    height, width = top + 4 * (cell + gap), left + len(columns) * (cell + gap)
    page = np.full((height, width, 3), 255, np.uint8)
    for i, shown in enumerate(columns):
        unknown = np.full_like(shown.frame, _UNKNOWN)
        rows = (
            shown.frame,
            unknown if shown.truth is None else _black_and_white(shown.truth),
            render.heatmap(shown.anomaly_map, threshold),
            _black_and_white(shown.anomaly_map > threshold),
        )
        for j, picture in enumerate(rows):
            y, x = top + j * (cell + gap), left + i * (cell + gap)
            page[y : y + cell, x : x + cell] = _fit(picture, cell)
    return _label(page, [c.title for c in columns], cell, gap, left, top)


def _black_and_white(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.repeat(mask.astype(np.uint8)[:, :, None] * np.uint8(255), 3, axis=2)


def _fit(picture: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    out = np.full((cell, cell, 3), 235, np.uint8)
    y, x = (cell - size[0]) // 2, (cell - size[1]) // 2
    out[y : y + size[0], x : x + size[1]] = resize_frames(picture, size)
    return out


def _label(
    page: NDArray[np.uint8], titles: Sequence[str], cell: int, gap: int, left: int, top: int
) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(page)
    pen = ImageDraw.Draw(canvas)
    ink, font = (30, 30, 30), render.font_of_size(14)
    for i, title in enumerate(titles):
        pen.text((left + i * (cell + gap), top - 20), title[: cell // 7], fill=ink, font=font)
    for j, name in enumerate(("input", "ground truth", "anomaly map", "segmentation")):
        pen.text((6, top + j * (cell + gap) + cell // 2 - 8), name, fill=ink, font=font)
    return np.asarray(canvas)
