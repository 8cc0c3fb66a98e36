"""Converts pixels of industrial cameras to uint8 H x W x 3 (RGB)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ...images import to_eight_bits
from ..camera import BadFrameError

__all__ = ["FORMATS", "to_rgb"]

_GRAY = {"Mono8": 8, "Mono10": 10, "Mono12": 12, "Mono14": 14, "Mono16": 16}
_COLOUR = {
    "RGB8": (3, (0, 1, 2)),
    "RGB8Packed": (3, (0, 1, 2)),
    "BGR8": (3, (2, 1, 0)),
    "BGR8Packed": (3, (2, 1, 0)),
    "RGBa8": (4, (0, 1, 2)),
    "RGBA8Packed": (4, (0, 1, 2)),
    "BGRa8": (4, (2, 1, 0)),
    "BGRA8Packed": (4, (2, 1, 0)),
}
FORMATS = (*_GRAY, *_COLOUR)
"""Names of the supported pixel formats, as in GenICam's PFNC and in older cameras."""


def to_rgb(
    data: NDArray[Any], pixel_format: str, size: tuple[int, int], white_level: int | None = None, name: str = ""
) -> NDArray[np.uint8]:
    """Copy a buffer into a frame.

    Gray of more than 8 bits is scaled by its white level, the same for every frame; alpha is dropped.

    Args:
        data: the buffer's values (uint8, or uint16 for gray of more bits), any shape; lines may be padded.
        pixel_format: its name.
        size: (height, width) in pixels.
        white_level: of gray with more than 8 bits; None: the maximum of the format's bits.
        name: of the frame, in errors.

    Returns:
        uint8 H x W x 3.

    Raises:
        ConfigError: an unsupported format.
        BadFrameError: a buffer of a different length.
    """
    height, width = size
    if pixel_format in _GRAY:
        bits = _GRAY[pixel_format]
        kind: Any = np.uint8 if bits == 8 else np.uint16
        lines = _lines(data, kind, height, width, pixel_format, name)
        gray = lines if bits == 8 else to_eight_bits(lines, white_level or (1 << bits) - 1)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if pixel_format in _COLOUR:
        channels, order = _COLOUR[pixel_format]
        pixels = _lines(data, np.uint8, height, width * channels, pixel_format, name).reshape(height, width, channels)
        return np.ascontiguousarray(pixels[:, :, order])
    cure = "set pixel_format to RGB8, BGR8 or Mono8 in the camera's options, or in the camera itself"
    if pixel_format.startswith("Bayer"):
        raise ConfigError(
            f"{name or 'The camera'} sends {pixel_format}.",
            "Programs convert Bayer patterns differently, which changes scores; let the camera convert.",
            cure,
        )
    raise ConfigError(f"{name or 'The camera'} sends {pixel_format}.", f"Accepted formats: {', '.join(FORMATS)}.", cure)


def _lines(data: NDArray[Any], kind: Any, height: int, width: int, pixel_format: str, name: str) -> NDArray[Any]:
    flat = np.ascontiguousarray(data).reshape(-1)
    if flat.dtype != kind:
        flat = flat.view(np.uint8)
        if kind is not np.uint8 and flat.size % 2 == 0:
            flat = flat.view(np.dtype(np.uint16).newbyteorder("<"))
    if (
        flat.dtype.itemsize != np.dtype(kind).itemsize
        or height < 1
        or flat.size % height
        or flat.size // height < width
    ):
        raise BadFrameError(
            f"{name or 'A frame'} is {flat.size} values long.",
            f"{pixel_format} with {height} lines of {width} needs {height * width}.",
            "check the camera's network: packets are lost",
            name,
        )
    return flat.reshape(height, -1)[:, :width]
