"""Arrays of floating-point numbers as TIFF files; Pillow writes only 32 bits."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FrameError

__all__ = ["encode_tiff"]

_SHORT, _LONG = 3, 4
_LARGEST = (1 << 32) - (1 << 16)


def encode_tiff(values: NDArray[Any]) -> bytes:
    """One page of one channel, not compressed, in one strip, little-endian.

    Args:
        values: float16, float32 or float64, H x W.

    Raises:
        FrameError: another dtype or shape, or more than 4 GiB.
    """
    array = np.asarray(values)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8) or array.ndim != 2 or not array.size:
        raise FrameError(f"A TIFF holds floating-point numbers H x W, not {array.dtype} {array.shape}.", "", "")
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    if len(data) > _LARGEST:
        raise FrameError(f"A map of {len(data) / 2**30:.1f} GiB is too large for a TIFF.", "", "write a smaller one")
    height, width = array.shape
    fields = [
        (256, _LONG, width),
        (257, _LONG, height),
        (258, _SHORT, 8 * array.dtype.itemsize),  # bits per sample
        (259, _SHORT, 1),  # no compression
        (262, _SHORT, 1),  # black is 0
        (273, _LONG, 0),  # where the strip begins, below
        (277, _SHORT, 1),  # samples per pixel
        (278, _LONG, height),  # rows of the strip
        (279, _LONG, len(data)),
        (339, _SHORT, 3),  # IEEE floating point
    ]
    start = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(
        struct.pack("<HHIHH", tag, kind, 1, value, 0)
        if kind == _SHORT
        else struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value)
        for tag, kind, value in fields
    )
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + data
