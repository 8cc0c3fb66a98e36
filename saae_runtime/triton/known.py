"""What server and client share: the schema of the parameter `saae`, and a frame with a known score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SCHEMA", "known_frame"]

SCHEMA = 1
"""Version of the parameter `saae` of a served model."""


def known_frame(size: tuple[int, int]) -> NDArray[np.uint8]:
    """The frame for checking a server: slanted bands of all values, with another slant in each channel.

    Args:
        size: (height, width).

    Returns:
        uint8 height x width x 3.
    """
    height, width = size
    rows, columns, channels = np.ogrid[:height, :width, :3]
    return ((3 * rows + (5 + 2 * channels) * columns + 40 * channels) % 256).astype(np.uint8)
