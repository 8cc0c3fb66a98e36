"""Masks as COCO run-length encoding, in numpy alone; pycocotools and what builds on it read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["coco_rle"]


def coco_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's compressed form: `{"size": [height, width], "counts": "..."}`, ready for JSON.

    Runs go down the columns and begin with a run of zeros. Each run but the first three is told by its difference from
    the one before the last, and each number by letters of five bits, lowest first, with a bit that says whether another
    follows.

    Args:
        mask: bool H x W.
    """
    height, width = mask.shape
    flat = np.asarray(mask, np.bool_).T.reshape(-1)
    change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []  # the run of zeros that a mask begins with may be empty
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
