"""Image files with 16 bits a channel in colour, which Pillow reads and cannot write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_COLOUR_TYPE = {2: 4, 3: 2, 4: 6}


def deep_png(path: Path, pixels: NDArray[np.uint16]) -> Path:
    """Writes uint16 H x W x 2 (gray and alpha), 3 (RGB) or 4 (RGBA)."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPE[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def deep_ppm(path: Path, pixels: NDArray[np.uint16]) -> Path:
    """Writes uint16 H x W x 3."""
    height, width, _ = pixels.shape
    path.write_bytes(b"P6 %d %d 65535\n" % (width, height) + pixels.astype(">u2").tobytes())
    return path
