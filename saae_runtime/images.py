"""Image files to arrays: the one reader that training, export and runtime share."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ImageError

__all__ = ["IMAGE_SUFFIXES", "read_image", "read_mask"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
"""File name endings (lower case) that count as images when a folder is listed."""


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Reads an image file as the runtime sees a camera frame.

    Deliberate choices, the same everywhere: EXIF rotation is applied; gray is repeated into three channels; an
    alpha channel is dropped, not blended (a line camera has none, and a drawing tool's default background is no
    part of the product); 16-bit gray is scaled over its full range (v / 257), never by the image's own minimum
    and maximum, which would make two frames incomparable; palettes and CMYK are converted.

    Args:
        path: the file.

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
                gray = ((wide + 128) // 257).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
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
    """Reads a ground-truth mask: any nonzero pixel is defective.

    A lossy format (JPEG, lossy WebP) leaves faint gray around a mask's edges, which counts as defective too: the mask
    gains a rim of up to a block of the format (8 or 16 pixels). Masks belong in PNG.

    Returns:
        bool array of shape H x W.

    Raises:
        ImageError: the file is missing, empty, truncated or no image.
    """
    from PIL import Image

    file = Path(path)
    image: Any = _open(file)
    try:
        with image:
            image.load()
            if image.mode in ("LA", "RGBA", "PA", "P", "CMYK"):  # opaque, or ink, is not defective
                image = image.convert("RGB")
            values = np.asarray(image)
    except Exception as error:
        raise _unreadable(file, error) from error
    finally:
        Image.Image.close(image)
    return np.any(values != 0, axis=2) if values.ndim == 3 else values != 0


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
