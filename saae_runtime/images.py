"""Reads image files; shared by training, export and runtime."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ImageError
from .files import IrregularFileError, LargeFileError, read_regular

__all__ = [
    "FORMATS",
    "FULL_RANGE",
    "IMAGE_SUFFIXES",
    "MOST_PIXELS",
    "PIXELS_VARIABLE",
    "check_readable",
    "check_white_level",
    "is_deep_colour",
    "most_pixels",
    "open_image",
    "page_numbers",
    "read_image",
    "read_image_bytes",
    "read_levels",
    "read_mask",
    "read_pages",
    "to_eight_bits",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
"""File name endings (lower case) that count as images when a folder is listed."""

FULL_RANGE = 65535
"""White in 16 bits."""
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
"""Supported formats, recognised by content, not by name. Others may start programs (EPS: Ghostscript)."""

MOST_PIXELS = 180_000_000
"""Pixels of the largest image that is read, unless `PIXELS_VARIABLE` sets another limit."""

PIXELS_VARIABLE = "SAAE_MAX_PIXELS"
"""Environment variable that raises (or lowers) the limit."""

_MOST_ASPECT = 1000  # largest aspect ratio: beyond it, resizing a small file may take gigabytes
_MOST_PAGES = 10_000
_BYTES_PER_PIXEL = 8  # 16-bit RGBA without compression
_SMALL_FILE = 64 << 20  # bytes that are always read, also with a low limit in pixels
_REDUCED, _MASK = 1, 4  # TIFF tag 254: pages that are a thumbnail or a transparency mask of another one


def most_pixels() -> int:
    """The current limit in pixels.

    Raises:
        ConfigError: the environment variable holds no number.
    """
    named = os.environ.get(PIXELS_VARIABLE, "").strip()
    if not named:
        return MOST_PIXELS
    if not named.isascii() or not named.isdigit() or len(named) > 15 or int(named) < 1:
        raise ConfigError(
            f"{PIXELS_VARIABLE}={named!r} is not a number of pixels.", "", f"export {PIXELS_VARIABLE}={MOST_PIXELS}"
        )
    return int(named)


def check_white_level(value: int | None) -> int | None:
    """Check a white level.

    Raises:
        ConfigError: not a whole number from 255 to 65535.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 255 <= value <= FULL_RANGE):
        return value
    raise ConfigError(
        f"A white level of {value!r} is not possible.",
        f"It is the largest value that the camera gives in a 16-bit file: 255 to {FULL_RANGE}.",
        "1023 for 10 bits, 4095 for 12, 16383 for 14",
    )


def to_eight_bits(values: NDArray[Any], white_level: int | None = None) -> NDArray[np.uint8]:
    """Scale 16-bit levels to 8 bits: 0 stays black, the white level and anything above it become 255.

    The scale belongs to the camera and is the same for every frame. A frame's own minimum and maximum would make frames
    incomparable.

    Args:
        values: levels 0..65535, any shape.
        white_level: the level of white, 255..65535; None: 65535.
    """
    white = white_level or FULL_RANGE
    table = np.minimum((np.arange(FULL_RANGE + 1, dtype=np.int64) * 255 + white // 2) // white, 255).astype(np.uint8)
    found: NDArray[np.uint8] = table[values]
    return found


def read_image(path: str | os.PathLike[str], white_level: int | None = None) -> NDArray[np.uint8]:
    """Read an image file as uint8 RGB.

    The same rules everywhere: EXIF rotation is applied; gray is repeated into three channels; an
    alpha channel is dropped, not blended (a line camera has none, and a drawing tool's default background is not
    part of the product); 16-bit gray is scaled by the camera's white level, see
    `to_eight_bits`; of 16-bit colour the upper 8 bits are read; palettes and CMYK are converted.

    Args:
        path: the file.
        white_level: largest value of the camera's pixels in a 16-bit file, such as 4095; None: 65535. 8-bit files are
            not scaled.

    Returns:
        uint8 array of shape H x W x 3, RGB.

    Raises:
        ImageError: the file is missing, empty, truncated, not a regular file, of none of `FORMATS`, too large, holds
            floating-point pixels or several pages, or 16-bit colour that a white level is given for.
    """
    pages = read_pages(path, white_level)
    try:
        _, count, image = next(pages)
    finally:
        pages.close()
    if count > 1:
        raise ImageError(
            f"{path}: holds {count} pages, not one image.",
            "Only the first would be used, and what the others show would count as seen.",
            "save each page as a file of its own; saae-run takes such files and judges every page",
        )
    if isinstance(image, ImageError):
        raise image
    return image


def read_image_bytes(
    data: bytes,
    name: str,
    white_level: int | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    pixels: int | None = None,
) -> NDArray[np.uint8]:
    """Decode an image from bytes, by the same rules as `read_image`.

    Args:
        data: a whole image file.
        name: for messages.
        white_level: see `read_image`.
        formats: accepted formats, of `FORMATS`.
        pixels: limit below that of `most_pixels`; checked before decoding.

    Raises:
        ImageError: empty, truncated, of another format, too large, of floating-point pixels or several pages.
    """
    with _opened(name, data, formats) as image, _explained(name):
        width, height = image.size
        if pixels is not None and width * height > pixels:
            raise ImageError(
                f"{name}: {width} x {height} pixels are above the limit here ({pixels:,}).",
                "",
                "send it smaller, or have the limit raised",
            )
        _check_size(name, image.size)
        if len(page_numbers(image)) > 1:
            raise ImageError(f"{name}: holds several pages, not one image.", "", "send each page as an image")
        return _to_rgb(name, image, white_level)


def read_pages(
    path: str | os.PathLike[str], white_level: int | None = None
) -> Generator[tuple[int, int, NDArray[np.uint8] | ImageError], None, None]:
    """Read every page of an image file: of a multi-page TIFF, an APNG or an animated WebP; one of any other image.

    Thumbnails and transparency masks inside a TIFF do not count as pages, nor do previews inside a JPEG.

    Args:
        path: the file.
        white_level: of 16-bit files, see `read_image`.

    Yields:
        (number from 1, number of pages, the page as in `read_image` or the ImageError in its place).

    Raises:
        ImageError: the file itself cannot be read; see `read_image`.
    """
    file = Path(path)
    with open_image(file) as image:
        with _explained(file):
            pages = page_numbers(image)
        count = len(pages)
        if count > _MOST_PAGES:
            raise ImageError(f"{file}: holds {count} pages.", f"The limit is {_MOST_PAGES}.", "split the file")
        for number, index in enumerate(pages, start=1):
            name = f"{file}#{number}" if count > 1 else str(file)
            try:
                with _explained(name):
                    if count > 1:
                        image.seek(index)
                    _check_size(name, image.size)
                    pixels = _to_rgb(name, image, white_level)
            except ImageError as error:
                yield number, count, error
                if image.format != "TIFF" and number < count:  # the frames after it build on this one
                    left = count - number
                    yield number + 1, count, _lost(name, left)
                    return
                continue
            yield number, count, pixels


def _lost(name: str, left: int) -> ImageError:
    return ImageError(
        f"{name}: {left} page{'' if left == 1 else 's'} behind it cannot be read either.",
        "Each page of an animation builds on the one before.",
        "copy the file again, or save each page as a file of its own",
    )


def page_numbers(image: Any) -> list[int]:
    """Pillow's numbers of those frames of an opened image that are pages; see `read_pages`."""
    if image.format == "MPO":
        return [0]
    if image.format != "TIFF":
        return list(range(int(getattr(image, "n_frames", 1))))
    kept = []
    for index in range(_MOST_PAGES + 1):
        try:
            image.seek(index)
        except EOFError:
            break
        except Exception:  # a damaged directory: the error comes with the page
            kept.append(index)
            break
        if not int(image.tag_v2.get(254, 0)) & (_REDUCED | _MASK):
            kept.append(index)
    image.seek(0)
    return kept or [0]


def is_deep_colour(image: Any) -> bool:
    """Whether an opened image has colours, or gray with transparency, of 16 bits: Pillow reads the upper 8 of them."""
    if image.mode.startswith("I"):
        return False
    return any(
        ";16" in str(tile[3]) or (tile[0] == "ppm" and isinstance(tile[3], tuple) and tile[3][1] > 255)
        for tile in getattr(image, "tile", ())
    )


def _to_rgb(name: str, image: Any, white_level: int | None) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if white_level not in (None, FULL_RANGE) and is_deep_colour(image):
        raise ImageError(
            f"{name}: 16-bit colour, to which a white level of {white_level} cannot be applied.",
            "Only the upper 8 bits of such a file can be read, and they would be nearly black.",
            "save the image with 8 bits a channel, or as 16-bit gray",
        )
    upright: Any = ImageOps.exif_transpose(image)
    upright.load()
    mode = str(upright.mode)
    if mode.startswith("I;16") or mode == "I":
        wide = np.asarray(upright).astype(np.int64)
        if wide.min(initial=0) < 0 or wide.max(initial=0) > 65535:
            raise ImageError(
                f"{name}: 32-bit pixels outside 0..65535.",
                "Only 8-bit and 16-bit images have a known white level.",
                "save the image as 8-bit or 16-bit PNG",
            )
        return np.repeat(to_eight_bits(wide, white_level)[:, :, None], 3, axis=2)
    if mode == "F":
        raise ImageError(
            f"{name}: floating-point pixels.",
            "Their white level is unknown, and guessing it would make frames incomparable.",
            "save the image as 8-bit or 16-bit PNG",
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        # convert("RGB") drops alpha; premultiplied modes must be undone first.
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert("RGB"), dtype=np.uint8).copy()


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.bool_]:
    """Read a ground-truth mask: pixels at or above half-way between black and white are defective.

    So the border pixels of an anti-aliased or lossy mask belong to the side that covers most of them. In a mask whose
    brightest pixel is below half-way (numbers of defect types, or ones), and in one with a coloured palette, every
    pixel that is not black is defective. EXIF rotation is applied as in `read_image`.

    Returns:
        bool array of shape H x W.

    Raises:
        ImageError: the file is missing, empty, truncated, not a regular file, too large or no image.
    """
    levels, white = read_levels(path)
    half = 0 if white is None else white // 2 + 1
    found: NDArray[np.bool_] = levels != 0 if levels.max(initial=0) < half or not half else levels >= half
    return found


def read_levels(path: str | os.PathLike[str]) -> tuple[NDArray[Any], int | None]:
    """The stored levels of a file, of the brightest channel and upright, and its white level.

    Returns:
        array of shape H x W, of the file's own dtype, and 255 or 65535; None where the levels are labels (a palette
        with colours).

    Raises:
        ImageError: the file is missing, empty, truncated, not a regular file, too large or no image.
    """
    from PIL import ImageOps

    file = Path(path)
    with open_image(file) as image, _explained(file):
        _check_size(str(file), image.size)
        upright: Any = ImageOps.exif_transpose(image)
        upright.load()
        palette = upright.mode in ("P", "PA")
        if upright.mode in ("LA", "RGBA", "PA", "P", "CMYK"):  # opaque, or ink, is not defective
            upright = upright.convert("RGB")
        values = np.asarray(upright)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255, 255
    coloured = palette and bool((values != values[:, :, :1]).any())
    levels = values.max(axis=2) if values.ndim == 3 else values
    white = 65535 if levels.max(initial=0) > 255 else 255
    return levels, None if coloured else white


def check_readable(path: str | os.PathLike[str]) -> None:
    """Check that a path is a regular file, or a link to one: a FIFO or a device would hang or never end.

    Raises:
        ImageError: it is something else. A missing file passes: opening it gives a better error.
    """
    try:
        regular = stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return
    if not regular:
        raise _irregular(Path(path))


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an image of one of `FORMATS` in Pillow, its pixels not decoded yet.

    Yields:
        Pillow's image.

    Raises:
        ImageError: the file is missing, empty, not a regular file, too large, or of none of `FORMATS`.
    """
    file = Path(path)
    limit = max(_SMALL_FILE, _BYTES_PER_PIXEL * most_pixels())
    try:
        data = read_regular(file, limit)
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such file.", "", "check the path") from error
    except IrregularFileError as error:
        raise _irregular(file) from error
    except LargeFileError as error:
        pixels = error.size // _BYTES_PER_PIXEL + 1
        raise ImageError(
            f"{file}: {error.size:,} bytes are above the limit ({limit:,}).",
            "The limit follows from the largest number of pixels.",
            _raise_it(pixels),
        ) from None
    except (OSError, ValueError, MemoryError) as error:
        raise _unreadable(file, error) from error
    with _opened(str(file), data, FORMATS) as image:
        yield image


@contextmanager
def _opened(name: str, data: bytes, formats: Sequence[str]) -> Iterator[Any]:
    if not data:
        raise ImageError(f"{name}: the file is empty.", "0 bytes on disk.", "copy it again from the camera")
    with _explained(name):
        image = _decoder(data, formats)
    if image is None:
        raise ImageError(
            f"{name}: cannot be read as an image.",
            f"Its content is none of {', '.join(formats)}, whatever its name says.",
            "remove it, or copy it again",
        )
    with image:
        yield image


def _decoder(data: bytes, formats: Sequence[str]) -> Any:
    """Open bytes by the format of their header; None for an unsupported format.

    `Image.open` is not used, because its limit in pixels is global to the process, a setting of the host program. The
    bytes are in memory, because Pillow maps uncompressed files that it opens by name, and then scrambles gray TIFFs
    whose orientation swaps the sides.
    """
    from PIL import Image

    Image.preinit()
    if not set(FORMATS) <= set(Image.OPEN):
        Image.init()
    problem: Exception | None = None
    for name in formats:
        factory, accept = Image.OPEN.get(name, (None, None))  # a Pillow without WebP has no such entry
        if factory is None or (accept is not None and accept(data[:16]) is not True):
            continue
        try:
            return factory(io.BytesIO(data), "")
        except SyntaxError:  # not this format
            continue
        except Exception as error:
            problem = error
    if problem is not None:
        raise problem
    return None


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    limit = most_pixels()
    if width * height > limit:
        raise ImageError(
            f"{name}: {width} x {height} pixels are above the limit ({limit:,}).",
            "The limit keeps a small damaged or hostile file from filling the memory.",
            _raise_it(width * height),
        )
    if max(width, height) > _MOST_ASPECT * max(min(width, height), 1):
        raise ImageError(
            f"{name}: {width} x {height} pixels are a line, not an image.",
            f"Its long side is more than {_MOST_ASPECT} times its short one.",
            "cut it into pieces of the product",
        )


def _raise_it(pixels: int) -> str:
    return f"if the file is what it should be, raise the limit: export {PIXELS_VARIABLE}={pixels}"


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        raise _unreadable(name, error) from error


def _irregular(file: Path) -> ImageError:
    return ImageError(
        f"{file}: cannot be read: it is not a regular file.",
        "It is a folder, a pipe, a device or a socket: reading it could block for ever or never end.",
        "remove it, or copy the image's content into a file",
    )


def _unreadable(name: str | Path, error: BaseException) -> ImageError:
    if type(error).__name__ == "DecompressionBombError":  # WebP and tiled TIFF ask Pillow's own limit
        return ImageError(
            f"{name}: larger than this format is read.", str(error), "save it as PNG, or as TIFF without tiles"
        )
    if isinstance(error, MemoryError):
        return ImageError(
            f"{name}: there is not enough memory to read it.", "", "scale it down, or give this machine more memory"
        )
    return ImageError(
        f"{name}: cannot be read as an image.",
        f"{type(error).__name__}: {error}",
        "open it in a viewer; if that fails too, remove it or copy it again",
    )
