"""Finds the images of a build: named folders, the usual places, or the drawn demo data."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import ConfigError
from saae_runtime.progress import Progress, silent
from saae_train.data.category import Category, Sample, distinct_names, find_category, from_folders, list_categories
from saae_train.data.demo import DEMO_CATEGORIES, write_demo
from saae_train.data.layouts import is_category
from saae_train.data.shape import typical_shape

__all__ = [
    "DATA_VARIABLE",
    "Request",
    "find_images",
    "is_named",
    "named_frames",
    "samples_named",
    "shared_size",
    "without_excluded",
]

DATA_VARIABLE = "SAAE_DATA"
"""Environment variable that names the folder of categories."""

_USUAL = Path("data")


@dataclass(frozen=True)
class Request:
    """The images that the user asked for.

    Attributes:
        category: name of the product; also a name in `data`.
        data: folder of categories (MVTec AD tree).
        normal, abnormal, masks, normal_test: own folders, instead of `data`, see `from_folders`.
        demo: use the drawn images in any case.
    """

    category: str | None = None
    data: Path | None = None
    normal: tuple[Path, ...] = ()
    abnormal: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    normal_test: tuple[Path, ...] = ()
    demo: bool = False


def find_images(request: Request, demo_root: Path, progress: Progress = silent) -> tuple[Category, str]:
    """List the images of a build; draw the demo set if nothing else was named or found.

    The order: own folders, `data`, the folder named by SAAE_DATA, ./data, the demo set.

    Args:
        request: what was asked for.
        demo_root: folder of the demo set.
        progress: called with (done, total).

    Returns:
        The category, and a text that says where it was found.

    Raises:
        ConfigError: options that exclude each other, or no such category anywhere.
        DataError: a named folder does not hold the expected images.
    """
    if request.normal:
        if request.data is not None or request.demo:
            raise ConfigError(
                "--normal and --data (or --demo) are both given.",
                "Each of them says where all the images are.",
                "leave one of them out",
            )
        category = from_folders(request.normal, request.abnormal, request.masks, request.category, request.normal_test)
        return category, ", ".join(map(str, request.normal))
    for name in ("abnormal", "masks", "normal_test"):
        if getattr(request, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} is given without --normal.",
                "It is for images in your own folders.",
                "add --normal FOLDER",
            )
    if request.demo:
        return _demo(request.category or "zipper", demo_root, progress)
    if request.data is not None:
        return find_category(request.data, request.category or _only(request.data)), str(request.data)
    if request.category is None:
        raise ConfigError(
            "No product was named.",
            "A build needs --category NAME, or --normal FOLDER.",
            "saae-export build --category zipper, or saae-export build --normal FOLDER",
        )
    return _usual(request.category, demo_root, progress)


def shared_size(samples: Sequence[Sample]) -> tuple[int, int] | None:
    """(height, width) of all images as they are read (EXIF rotation applied); None if they differ."""
    shape = typical_shape(samples)
    return shape.size if shape is not None and shape.shared else None


def is_named(name: str, pattern: str) -> bool:
    """Whether a name is the given one, or matches it as a pattern: `part [3].png` is both.

    A name that has folders, `night/3.png`, can be given without them.
    """
    return any(one == pattern or fnmatch(one, pattern) for one in (name, PurePosixPath(name).name))


def samples_named(samples: Sequence[Sample], patterns: Sequence[str], option: str) -> set[Sample]:
    """The images whose names match one of the patterns (`023.png`, `night/*`) that `option` was given.

    Raises:
        ConfigError: a pattern that matches no image.
    """
    names = distinct_names([sample.path for sample in samples])
    found: set[Sample] = set()
    for pattern in patterns:
        matches = {sample for sample, name in zip(samples, names, strict=True) if is_named(name, pattern)}
        if not matches:
            raise ConfigError(
                f"{option} {pattern} matches no image.",
                f"The {len(names)} normal images are named like {names[0] if names else 'nothing'}.",
                "give the file's name, or a pattern such as 'night_*'",
            )
        found |= matches
    return found


def without_excluded(category: Category, patterns: Sequence[str]) -> Category:
    """The category without the normal images whose names match a pattern.

    Raises:
        ConfigError: a pattern that matches no image.
    """
    gone = samples_named(category.train, patterns, "--exclude")
    return dataclasses.replace(category, train=tuple(sample for sample in category.train if sample not in gone))


def named_frames(samples: Sequence[Sample]) -> list[tuple[str, NDArray[np.uint8]]]:
    """(name, frame uint8 H x W x 3) pairs of images."""
    names = distinct_names([sample.path for sample in samples])
    return [(f"{item.label}-{name}", item.read()) for item, name in zip(samples, names, strict=True)]


def _usual(name: str, demo_root: Path, progress: Progress) -> tuple[Category, str]:
    places = []
    named = os.environ.get(DATA_VARIABLE)
    if named:
        places.append((Path(named), f"{named}, from {DATA_VARIABLE}"))
    places.append((_USUAL, f"./{_USUAL}"))
    known = []
    for root, words in places:
        if not root.is_dir():
            continue
        there = list_categories(root)
        if name in there:
            return find_category(root, name), words
        known += there
    if name in DEMO_CATEGORIES:
        return _demo(name, demo_root, progress)
    known += DEMO_CATEGORIES
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    looked = ", ".join(words for _, words in places)
    raise ConfigError(
        f"There is no category {name!r}.",
        f"Looked in {looked}, and among the demo sets ({', '.join(DEMO_CATEGORIES)}).",
        f"did you mean {' or '.join(near)}?" if near else "say where its images are: --data FOLDER or --normal FOLDER",
    )


def _only(root: Path) -> str:
    there = list_categories(root)
    if len(there) == 1:
        return there[0]
    if is_category(root):
        return root.resolve().name
    listed = ", ".join(there) or "none (no folder in a known layout)"
    raise ConfigError(f"Which category of {root}?", f"There are: {listed}.", "add --category NAME")


def _demo(name: str, demo_root: Path, progress: Progress) -> tuple[Category, str]:
    category = write_demo(demo_root, name, progress=progress)
    return category, f"drawn demo images, in {category.root}"
