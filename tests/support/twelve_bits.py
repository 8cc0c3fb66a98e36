"""The same pictures twice: gray in 8 bits, and as a 12-bit camera stores them in 16-bit files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 4095


def write_twice(frames: Sequence[NDArray[np.uint8]], folder: Path) -> tuple[Path, Path]:
    """Writes gray levels, uint8 H x W each; read at their white level, the deep files equal the plain ones to the bit.

    Returns:
        The folder of the 8-bit files and that of the 12-bit ones, with the same names.
    """
    plain, deep = folder / "plain", folder / "deep"
    for place in (plain, deep):
        place.mkdir(parents=True)
    for number, gray in enumerate(frames):
        Image.fromarray(gray).save(plain / f"{number}.png")
        Image.fromarray(np.rint(gray * (WHITE / 255)).astype(np.uint16)).save(deep / f"{number}.png")
    return plain, deep
