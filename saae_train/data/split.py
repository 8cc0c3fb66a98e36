"""Splits a product's normal images into a part to fit on and a held-out part, by content, not by name.

For a fitted model the split follows from the hashes of the fitted images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from saae_runtime.errors import DataError
from saae_runtime.files import sha256_file

from ..config import FitConfig
from ..record import FitRecord
from .bursts import first_copies
from .category import Category, Sample

__all__ = [
    "MIN_FIT",
    "MIN_HELD_OUT",
    "Split",
    "content_digest",
    "content_hashes",
    "split_for",
    "split_held_out",
    "split_of",
    "spread",
]

MIN_FIT = 4
"""Fewest different normal images that the model is fitted to."""

MIN_HELD_OUT = 2
"""Fewest different normal images that the thresholds are calibrated on."""

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """The two parts of a product's normal images.

    Attributes:
        fitting: to fit on, and to take the ranges of INT8 from.
        held_out: to calibrate thresholds and to test on.
        unseen: whether the model has seen none of `held_out`.
        note: remark on the choice for the user; empty if nothing is unusual.
    """

    fitting: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    unseen: bool = True
    note: str = ""

    @property
    def normal(self) -> tuple[Sample, ...]:
        """Normal images to show: the held-out ones, or else the fitted ones."""
        return self.held_out or self.fitting


def split_for(config: FitConfig, category: Category) -> Split:
    """The split for a new fit.

    Raises:
        DataError: too few images, or one that cannot be read.
    """
    fitting, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    used = {sample.path for sample in (*fitting, *held_out)}
    return Split(fitting, held_out, note=_about([s.path.name for s in category.train if s.path not in used]))


def _about(copies: Sequence[str]) -> str:
    """What is said of files that show a picture which is used already."""
    if not copies:
        return ""
    more = f" and {len(copies) - 3} more" if len(copies) > 3 else ""
    return f"not used, because another file shows the same picture: {', '.join(copies[:3])}{more}"


def split_of(record: FitRecord, config: FitConfig, category: Category) -> Split:
    """The split of a fitted model: the split of its fit, or the images that it was not fitted on.

    Args:
        record: the record of the fit.
        config: of the fit; its share and seed decide the split.
        category: the images at hand.

    Raises:
        DataError: too few images to split, or one that cannot be read.
    """
    fitting, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    if config.memory is not None:
        return Split(fitting, held_out)  # thresholds come from the fit
    if record.fitted_on is None:
        if record.digest == content_digest(fitting):
            return Split(fitting, held_out)
        note = (
            "The model does not say which images it was fitted on: it may have seen some of those it is "
            "calibrated on. The bundle says so, too."
        )
        return Split(fitting, held_out, False, note)
    seen = set(record.fitted_on)
    overlap = sum(key in seen for key in content_hashes(held_out))
    if not overlap:
        return Split(fitting, held_out)
    keys = content_hashes(category.train)
    new = {key: sample for key, sample in zip(keys, category.train, strict=True) if key not in seen}
    if len(new) >= MIN_HELD_OUT:
        known = tuple(sample for key, sample in zip(keys, category.train, strict=True) if key in seen)
        note = (
            f"These are not just the images that the model was fitted on: taking the {len(new)} that it has not seen."
        )
        return Split(known, tuple(new[key] for key in sorted(new)), True, note)
    note = (
        f"{overlap} of the {len(held_out)} images to calibrate on were FITTED ON: thresholds come out too low, and "
        "good parts will be called defective. Add normal images that the model has not seen."
    )
    return Split(fitting, held_out, False, note)


def _each_once(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """One copy of each picture, in the order of the paths."""
    ordered = sorted(samples, key=lambda sample: _natural(sample.path.as_posix()))
    found = tuple(group[0] for group in _copies(ordered))
    if len(found) < MIN_FIT:
        raise DataError(
            f"{len(found)} different normal images are too few: at least {MIN_FIT} are needed.",
            "The model learns from them what is normal, and how much normal images differ; 50 or more are advisable.",
            "add normal images",
        )
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame_9 before frame_10: neighbours of a burst stay neighbours."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", name)]


def _copies(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Groups of files that show one picture: of equal bytes, or alike as only copies are."""
    equal: dict[str, list[Sample]] = {}
    for sample in samples:
        equal.setdefault(_file_hash(sample.path), []).append(sample)
    groups = list(equal.values())
    first = first_copies([group[0] for group in groups])
    for index, place in enumerate(first):
        if place != index:
            groups[place] += groups[index]
    return [group for index, group in enumerate(groups) if first[index] == index]


def split_held_out(
    samples: Sequence[Sample], fraction: float = 0.15, minimum: int = 4, seed: int = 0
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Split normal images into a part to fit on and a part to calibrate thresholds on.

    The split follows from what is in the files and from the seed, not from names, order or folder, so renaming or
    moving images changes nothing; copies of one picture, saved in whatever way, always fall on the same side. Both
    parts come back in an order that depends on content and seed alone.

    Args:
        samples: normal images.
        fraction: share to hold out, below 1; with 0 every picture is fitted, each once, in the order of the paths.
        minimum: hold out at least this many if there are enough images (never fewer than `MIN_HELD_OUT`).
        seed: another seed, another split.

    Returns:
        (to fit on, held out).

    Raises:
        DataError: fewer than `MIN_FIT + MIN_HELD_OUT` different images, or an impossible fraction.
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"A share of {fraction} cannot be held out.", "It must lie between 0 and 1.", "use e.g. 0.15")
    if fraction == 0.0:
        return _each_once(samples), ()
    groups: dict[str, list[Sample]] = {}
    for group in _copies(sorted(samples, key=lambda sample: _file_hash(sample.path))):
        key = hashlib.sha256(f"{seed}:{_file_hash(group[0].path)}".encode()).hexdigest()
        groups[key] = group
    different, needed = len(groups), MIN_FIT + MIN_HELD_OUT
    if different < needed:
        copies = f" ({len(samples)} files, the rest are copies)" if len(samples) != different else ""
        noun = "image is" if different == 1 else "images are"
        raise DataError(
            f"{different} normal {noun} too few{copies}: at least {needed} different ones are needed.",
            f"{MIN_FIT} to fit the model on, and {MIN_HELD_OUT} that it has not seen to set the thresholds; "
            "50 or more are advisable.",
            "add normal images",
        )
    want = max(round(fraction * different), minimum, MIN_HELD_OUT)
    # With few images a larger share is held out, but never more than half of them.
    count = min(want, max(MIN_HELD_OUT, different // 2), different - MIN_FIT)
    order = sorted(groups)
    for key in order:
        groups[key].sort(key=lambda sample: sample.path.as_posix())
    held_out = tuple(sample for key in order[:count] for sample in groups[key])
    return tuple(sample for key in order[count:] for sample in groups[key]), held_out


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, the first one and then at even distances, in their order."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def content_digest(samples: Sequence[Sample]) -> str:
    """Hex sha256 over labels, images, masks and white levels of `samples`, in their order; paths do not count.

    The key of everything computed from a list of images: equal digests mean equal bytes in equal order.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(b"saae-samples-1")
    for sample in samples:
        mask = "+".join(_file_hash(path) for path in sample.masks) or "-"
        white = "" if sample.white_level is None else f" white {sample.white_level}"
        digest.update(f"\n{sample.label!r} {_file_hash(sample.path)} {mask}{white}".encode())
    return digest.hexdigest()


def content_hashes(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Hex sha256 of each image file, in the order of `samples`; names and masks do not count.

    Raises:
        DataError: a file cannot be read.
    """
    return tuple(_file_hash(sample.path) for sample in samples)


def _file_hash(path: Path) -> str:
    try:
        state = path.stat()
        return _cached_hash(str(path), state.st_size, state.st_mtime_ns, state.st_ino)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read.", f"{error.strerror or error}", "check that the file is there and readable"
        ) from error


@lru_cache(maxsize=100_000)
def _cached_hash(path: str, size: int, modified: int, inode: int) -> str:
    return sha256_file(path)
