"""Masks as COCO run-length encoding, with numpy only, for pycocotools and tools based on it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["coco_rle"]


def coco_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's compressed form: `{"size": [height, width], "counts": "..."}`, ready for JSON.

    Runs go down the columns, the first one of zeros. Each run after the third is stored as its difference from the run
    two before, and each number as letters of five bits, lowest first, with a bit that tells whether another follows.

    Args:
        mask: bool H x W.
    """
    height, width = mask.shape
    flat = np.asarray(mask, np.bool_).T.reshape(-1)
    change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # the first run of zeros may be empty
    edges = np.concatenate([np.zeros(1, np.int64), np.asarray(first, np.int64), change, [flat.size]])
    runs = np.diff(edges)
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    return {"size": [height, width], "counts": "".join(_letters(int(number)) for number in numbers)}


def _letters(number: int) -> str:
    text = ""
    while True:
        bits = number & 0x1F
        number >>= 5
        more = number != (-1 if bits & 0x10 else 0)
        text += chr(48 + (bits | 0x20 if more else bits))
        if not more:
            return text
