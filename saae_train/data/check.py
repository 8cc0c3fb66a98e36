"""Checks every image of a category before training and reports all problems at once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import DataError, ImageError
from saae_runtime.images import (
    FULL_RANGE,
    is_deep_colour,
    open_image,
    page_numbers,
    read_image,
    read_levels,
    read_mask,
)

from .category import Category, Sample

__all__ = ["Problem", "Report", "check"]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

SMALLEST_SIDE = 32
"""Images with a shorter side than this are reported."""

_CAMERA_BITS = (8, 10, 12, 14)
"""Bits per pixel of cameras whose images are saved as 16-bit files."""
_MOST_MARKED = 0.9
"""A mask that marks more of its image looks inverted."""
_MOST_BETWEEN, _MOST_LABELS = 0.2, 32
"""A mask with a larger share of gray pixels, of more levels, is a photograph."""


@dataclass(frozen=True)
class Problem:
    """One file and what is wrong with it (`what` completes the sentence "<path> ...")."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Report:
    """The result of `check`.

    Attributes:
        category: the category's name.
        images: images looked at.
        problems: what makes the data unusable, in the order of the files.
        warnings: what looks unintended but can be used.
    """

    category: str
    images: int
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no problems (warnings do not count)."""
        return not self.problems

    def raise_if_bad(self, show: int = 20) -> None:
        """Raise one DataError that lists the problems.

        Args:
            show: print at most this many; `DataError.problems` holds all of them.

        Raises:
            DataError: there are problems.
        """
        if self.ok:
            return
        lines = [str(problem) for problem in self.problems]
        more = [f"... and {len(lines) - show} more"] if len(lines) > show else []
        noun = "file is" if len(lines) == 1 else "files are"
        raise DataError(
            f"{len(lines)} {noun} not usable in the category {self.category!r}.",
            "\n       ".join(lines[:show] + more),
            "repair or remove them, then run the same command again; `saae-train check` lists them all",
            problems=lines,
        )


@dataclass(frozen=True)
class _Look:
    """What was read from one image file."""

    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    digest: str | None = None
    colour: bool | None = None
    peak: int | None = None  # of a 16-bit image


def check(
    category: Category, deep: bool = True, progress: Progress | None = None, workers: int | None = None
) -> Report:
    """Look at every image and mask of a category in one pass.

    Problems: unreadable, empty, truncated or not an image; several pages in one file; a mask that is missing, all
    black, of a different size than its image, a photograph (the image itself, for one), or without an image; the same
    image (by its decoded pixels) in training and test, or among both normal and defective test images; stray files.
    Warnings: copies within training or within one test label, one colour throughout, very small images,
    transparency, 16-bit colour, gray and colour mixed, a white level that does not fit 16-bit images, masks in lossy
    formats, with soft edges, or that mark nearly everything.

    Args:
        category: the images to check.
        deep: decode the pixels; False reads the headers only (no search for truncation and copies).
        progress: called after each image.
        workers: threads; by default one per processor, at most 8.

    Returns:
        The report; nothing is raised for bad files.
    """
    samples = [*category.train, *category.test]
    looks: list[_Look] = [_Look()] * len(samples)
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        pending: dict[Future[_Look], int] = {pool.submit(_look, s, deep): i for i, s in enumerate(samples)}
        done = 0
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                looks[pending.pop(future)] = future.result()
                done += 1
                if progress is not None:
                    progress(done, len(samples))
    finally:
        # On Ctrl-C the queued files are dropped at once instead of being read to the end.
        pool.shutdown(wait=True, cancel_futures=True)

    problems = [Problem(finding.path, finding.what) for finding in category.findings]
    warnings: list[Problem] = []
    for look in looks:
        problems += look.problems
        warnings += look.warnings
    copies, harmless = _copies(category, samples, looks)
    problems += copies
    warnings += _white_levels(category, samples, looks)
    warnings += harmless + _mixed_colour(category, looks[: len(category.train)])
    if category.ignored:
        endings = ", ".join(sorted({path.suffix or path.name for path in category.ignored}))
        count = len(category.ignored)
        noun = "file that is not an image is" if count == 1 else "files that are not images are"
        warnings.append(Problem(category.root, f"{count} {noun} ignored ({endings})"))
    if any(s.is_anomalous for s in category.test) and not category.has_masks:
        warnings.append(Problem(category.root, "has no ground-truth masks: only image-level metrics can be computed"))
    return Report(category.name, len(samples), tuple(_unique(problems)), tuple(_unique(warnings)))


def _look(sample: Sample, deep: bool) -> _Look:
    path = sample.path
    warnings: list[Problem] = []
    try:
        header = _header(path, warnings)
        if not deep:
            return _Look(warnings=tuple(warnings), colour=header.colour)
        pixels = sample.read()
        peak = int(read_levels(path)[0].max(initial=0)) if header.wide else None
    except ImageError as error:
        return _Look(problems=(Problem(path, _reason(path, error)),))
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        warnings.append(Problem(path, f"is only {width} x {height} pixels"))
    if pixels.size and bool((pixels == pixels.reshape(-1, 3)[0]).all()):
        warnings.append(Problem(path, "shows one colour throughout"))
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
    digest.update(f"{height}x{width}".encode())
    bad: list[Problem] = []
    for mask in sample.masks:
        wrong, odd = _look_at_mask(mask, sample, pixels)
        bad += wrong
        warnings += odd
    return _Look(tuple(bad), tuple(warnings), digest.hexdigest(), header.colour, peak)


@dataclass(frozen=True)
class _Header:
    colour: bool
    wide: bool


def _header(path: Path, warnings: list[Problem]) -> _Header:
    """Read the file's header only; add oddities to `warnings`.

    Raises:
        ImageError: the file is missing, empty or no image.
    """
    try:
        if path.stat().st_size == 0:
            raise ImageError(str(path), "is empty (0 bytes)")
        with open_image(path) as image:
            mode, pages = image.mode, len(page_numbers(image))
            deep = is_deep_colour(image)
            transparent = mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(str(path), "is missing") from error
    except Exception as error:  # Pillow raises many kinds on damaged headers
        raise ImageError(str(path), f"is not an image ({type(error).__name__}: {_short(path, error)})") from error
    if pages > 1:
        raise ImageError(str(path), f"holds {pages} pages, not one image")
    if transparent:
        warnings.append(Problem(path, "has transparency, which is dropped"))
    if deep:
        warnings.append(Problem(path, "is 16-bit colour, of which only the upper 8 bits are read"))
    if mode == "1":
        warnings.append(Problem(path, "is black and white only (1 bit): is it a mask?"))
    if mode == "CMYK":
        warnings.append(Problem(path, "is CMYK (print colours), which no camera gives"))
    wide = mode == "I" or mode.startswith("I;16")
    return _Header(mode not in ("1", "L", "LA", "La", "F", "I") and not wide, wide)


def _look_at_mask(
    path: Path, sample: Sample, pixels: NDArray[np.uint8]
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(problems, warnings) of one mask of a sample whose image is `pixels`."""
    try:
        levels, white = read_levels(path)
        mask = read_mask(path)
    except ImageError as error:
        return (Problem(path, _reason(path, error)),), ()
    height, width = pixels.shape[:2]
    if mask.shape != (height, width):
        what = f"is {mask.shape[1]} x {mask.shape[0]} pixels, its image {sample.path} is {width} x {height}"
        if mask.shape == (width, height) and _is_turned(sample.path):
            what += " (its EXIF orientation turns it): draw the mask on the upright image"
        return (Problem(path, what),), ()
    if not mask.any():
        return (Problem(path, f"is all black, though its image {sample.path} is labelled {sample.label!r}"),), ()
    if _is_photograph(path, levels, white, pixels, sample.white_level):
        return (Problem(path, f"is a photograph, not a mask of {sample.path}: a mask is black and white"),), ()
    warnings = [Problem(path, what) for what in (_inverted(mask), _soft(path, levels, mask, white)) if what]
    return (), tuple(warnings)


def _is_photograph(
    path: Path, levels: NDArray[Any], white: int | None, pixels: NDArray[np.uint8], white_level: int | None
) -> bool:
    """Whether a mask is the image itself, or full of gray levels as only a photograph is."""
    if np.array_equal(read_image(path, white_level), pixels) and np.unique(pixels).size > 2:
        return True
    if white is None or levels.dtype.kind == "f":
        return False
    between = (levels > white // 16) & (levels < white - white // 16)
    return float(between.mean()) > _MOST_BETWEEN and np.unique(levels[between]).size > _MOST_LABELS


def _inverted(mask: NDArray[np.bool_]) -> str:
    """Warning about a mask that marks nearly all of its image, or its whole border and half of it; else empty."""
    share = float(mask.mean())
    border = np.concatenate((mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    if share <= _MOST_MARKED and not (share > 0.5 and border.mean() > 0.95):
        return ""
    return f"marks {100 * share:.0f} % of its image as defective: is it inverted? Defects are white"


def _soft(path: Path, levels: NDArray[Any], mask: NDArray[np.bool_], white: int | None) -> str:
    """Warning about a mask in which levels below half-way lie beside defective pixels; else empty."""
    if _is_lossy(path):
        return (
            "is a mask in a lossy format, which blurs its edges: half-way between black and white is the limit; use PNG"
        )
    dropped = int(((levels != 0) & ~mask).sum())
    if white is None or not dropped:
        return ""
    share = 100 * dropped / int((levels != 0).sum())
    return (
        f"has gray levels: {share:.0f} % of what is not black is darker than half-way to white and counts as "
        "free of defects; if they are labels, save them as a mask of 0 and 255"
    )


def _is_turned(path: Path) -> bool:
    """Whether an image's EXIF orientation swaps its sides; False where it cannot be read."""
    try:
        with open_image(path) as image:
            return bool(image.getexif().get(0x0112, 1) in (5, 6, 7, 8))
    except Exception:  # Pillow raises many kinds on damaged headers
        return False


def _is_lossy(path: Path) -> bool:
    """Whether a file's content, by its header, is JPEG or lossy WebP; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return False
    # The first chunk of a WebP file without extras: "VP8 " is lossy, "VP8L" lossless.
    return head[:3] == b"\xff\xd8\xff" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP" and head[12:16] == b"VP8 ")


def _copies(category: Category, samples: list[Sample], looks: list[_Look]) -> tuple[list[Problem], list[Problem]]:
    """Images that occur more than once: (problems, warnings)."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    first: dict[str, int] = {}
    train = len(category.train)
    for index, (sample, look) in enumerate(zip(samples, looks, strict=True)):
        if look.digest is None:
            continue
        if look.digest not in first:
            first[look.digest] = index
            continue
        earlier = samples[first[look.digest]]
        if first[look.digest] < train <= index:
            problems.append(Problem(sample.path, f"is the same image as the training image {earlier.path}"))
        elif index >= train and sample.is_anomalous != earlier.is_anomalous:
            problems.append(
                Problem(sample.path, f"is the same image as {earlier.path}, but one is normal, the other defective")
            )
        else:
            warnings.append(Problem(sample.path, f"is the same image as {earlier.path}"))
    return problems, warnings


def _white_levels(category: Category, samples: list[Sample], looks: list[_Look]) -> list[Problem]:
    """Warning about the white level, from the brightest pixels of the 16-bit images; else empty."""
    peaks = [(look.peak, sample) for look, sample in zip(looks, samples, strict=True) if look.peak is not None]
    if not peaks:
        return []
    brightest, where = max(peaks, key=lambda pair: pair[0])
    white = where.white_level or FULL_RANGE
    if brightest > white:
        clipped = sum(peak > white for peak, _ in peaks)
        what = f"{clipped} 16-bit images are brighter than the white level of {white}, up to {brightest}, and clipped"
        return [Problem(category.root, what)]
    bits = next((bits for bits in _CAMERA_BITS if brightest < 2**bits), None)
    if bits is None or white < 2 ** (bits + 1):
        return []
    return [
        Problem(
            category.root,
            f"no pixel of its {len(peaks)} 16-bit images is above {brightest} of {white}: they look like those of a "
            f"{bits}-bit camera, and most of their gray levels are lost; give its white level: "
            f"--white-level {2**bits - 1}",
        )
    ]


def _mixed_colour(category: Category, looks: Iterable[_Look]) -> list[Problem]:
    kinds = Counter(look.colour for look in looks if look.colour is not None)
    if len(kinds) < 2:
        return []
    return [
        Problem(
            category.train[0].path.parent,
            f"mixes {kinds[False]} gray and {kinds[True]} colour images: one camera gives one kind",
        )
    ]


def _reason(path: Path, error: ImageError) -> str:
    """Why an image cannot be used; the text follows the file's name."""
    if error.what == str(path):
        return error.why
    head = error.what.removeprefix(f"{path}: ").rstrip(".")
    detail = _short(path, error.why)
    return f"{head} ({detail})" if detail else head


def _short(path: Path, error: object) -> str:
    """An error's text without the file's name, which comes first anyway."""
    return str(error).replace(f" {str(path)!r}", "").strip().rstrip(".")


def _unique(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
