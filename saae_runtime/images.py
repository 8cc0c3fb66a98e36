"""Image files to arrays: the one reader that training, export and runtime share."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ImageError

__all__ = [
    "FULL_RANGE",
    "IMAGE_SUFFIXES",
    "check_white_level",
    "read_levels",
    "read_image",
    "read_mask",
    "to_eight_bits",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
"""File name endings (lower case) that count as images when a folder is listed."""

FULL_RANGE = 65535
"""White in 16 bits."""


def check_white_level(value: int | None) -> int | None:
    """A white level as it was given.

    Raises:
        ConfigError: it is no whole number from 255 to 65535.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 255 <= value <= FULL_RANGE):
        return value
    raise ConfigError(
        f"A white level of {value!r} is not possible.",
        f"It is the largest value that the camera gives in a 16-bit file: 255 to {FULL_RANGE}.",
        "1023 for 10 bits, 4095 for 12, 16383 for 14",
    )


def to_eight_bits(values: NDArray[Any], white_level: int | None = None) -> NDArray[np.uint8]:
    """16-bit levels as 8-bit ones: 0 stays black, the white level and what lies above it become 255.

    The scale is the camera's and the same for every frame, never the frame's own minimum and maximum, which would make
    two frames incomparable.

    Args:
        values: levels 0..65535, any shape.
        white_level: the level of white, 255..65535; None: 65535.
    """
    white = white_level or FULL_RANGE
    table = np.minimum((np.arange(FULL_RANGE + 1, dtype=np.int64) * 255 + white // 2) // white, 255).astype(np.uint8)
    found: NDArray[np.uint8] = table[values]
    return found


def read_image(path: str | os.PathLike[str], white_level: int | None = None) -> NDArray[np.uint8]:
    """Reads an image file as the runtime sees a camera frame.

    Deliberate choices, the same everywhere: EXIF rotation is applied; gray is repeated into three channels; an
    alpha channel is dropped, not blended (a line camera has none, and a drawing tool's default background is no
    part of the product); 16-bit gray is scaled by the camera's white level, see
    `to_eight_bits`; palettes and CMYK are converted.

    Args:
        path: the file.
        white_level: largest value of the camera's pixels in a 16-bit file, such as 4095; None: 65535. 8-bit files are
            taken as they are.

    Returns:
        uint8 array of shape H x W x 3, RGB.

    Raises:
        ImageError: the file is missing, empty, truncated, no image, or holds floating-point pixels.
    """
    from PIL import ImageOps

    file = Path(path)
    image = _open(file)
    try:
        with image:
            upright: Any = ImageOps.exif_transpose(image)
            upright.load()
            mode = str(upright.mode)
            if mode.startswith("I;16") or mode == "I":
                wide = np.asarray(upright).astype(np.int64)
                if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
                    raise ImageError(
                        f"{file}: 32-bit pixels outside 0..65535.",
                        "Only 8-bit and 16-bit images have a known white level.",
                        "save the image as 8-bit or 16-bit PNG",
                    )
                return np.repeat(to_eight_bits(wide, white_level)[:, :, None], 3, axis=2)
            if mode == "F":
                raise ImageError(
                    f"{file}: floating-point pixels.",
                    "Their white level is unknown, and guessing it would make frames incomparable.",
                    "save the image as 8-bit or 16-bit PNG",
                )
            if mode in ("RGBA", "LA", "PA", "RGBa", "La"):
                # convert("RGB") drops alpha; premultiplied modes must be undone first.
                upright = upright.convert("RGBA")
            return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise _unreadable(file, error) from error


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.bool_]:
    """Reads a ground-truth mask: a pixel is defective from half-way between black and white on.

    Half-way, because the border pixels of an anti-aliased or lossy mask belong to the side that covers most of them.
    In a mask whose brightest pixel is below half-way (numbers of defect types, or a mask of ones), and in one whose
    palette holds colours, every pixel that is not black is defective. EXIF rotation is applied as in `read_image`.

    Returns:
        bool array of shape H x W.

    Raises:
        ImageError: the file is missing, empty, truncated or no image.
    """
    levels, white = read_levels(path)
    half = 0 if white is None else white // 2 + 1
    found: NDArray[np.bool_] = levels != 0 if levels.max(initial=0) < half or not half else levels >= half
    return found


def read_levels(path: str | os.PathLike[str]) -> tuple[NDArray[Any], int | None]:
    """The levels of a file as they are stored, of the brightest channel and upright, and its white level.

    Returns:
        array of shape H x W, of the file's own dtype, and 255 or 65535; None where the levels are labels (a palette
        with colours).

    Raises:
        ImageError: the file is missing, empty, truncated or no image.
    """
    from PIL import Image, ImageOps

    file = Path(path)
    image: Any = _open(file)
    try:
        with image:
            upright: Any = ImageOps.exif_transpose(image)
            upright.load()
            palette = upright.mode in ("P", "PA")
            if upright.mode in ("LA", "RGBA", "PA", "P", "CMYK"):  # opaque, or ink, is not defective
                upright = upright.convert("RGB")
            values = np.asarray(upright)
    except Exception as error:
        raise _unreadable(file, error) from error
    finally:
        Image.Image.close(image)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255, 255
    coloured = palette and bool((values != values[:, :, :1]).any())
    levels = values.max(axis=2) if values.ndim == 3 else values
    white = 65535 if levels.max(initial=0) > 255 else 255
    return levels, None if coloured else white


def _open(file: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        data = file.read_bytes()
        if not data:
            raise ImageError(f"{file}: the file is empty.", "0 bytes on disk.", "copy it again from the camera")
        # From memory, not by name: Pillow maps uncompressed files that it opens by name, and then scrambles gray TIFFs
        # whose orientation swaps the sides.
        return Image.open(io.BytesIO(data))
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such file.", "", "check the path") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{file}: cannot be read as an image.",
            "Its content is of no known image format, whatever its name says.",
            "remove it, or copy it again",
        ) from error
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ImageError:
    return ImageError(
        f"{file}: cannot be read as an image.",
        f"{type(error).__name__}: {error}",
        "open it in a viewer; if that fails too, remove it or copy it again",
    )
