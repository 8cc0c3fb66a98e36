"""Writes a drawn category as an MVTec AD tree, whole or not at all, and reuses one that is already there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saae_runtime.errors import ConfigError, DataError, StorageError
from saae_runtime.files import sha256_file
from saae_runtime.folders import atomic_directory

from ..category import SYNTHETIC_STAMP, Category, find_category
from . import weave, zipper, zipper_defects
from .canvas import F32, Camera, change_mask, reduce_to, streams, to_uint8

__all__ = ["DEMO_CATEGORIES", "DRAWING_VERSION", "defect_types", "render", "write_demo"]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

DRAWING_VERSION = 1
"""Raise it when the same seed gives other pictures, so that older sets are redrawn."""

SMALLEST = 64


@dataclass(frozen=True)
class _Kind:
    """How one category is made, damaged and drawn."""

    number: int
    make: Callable[[np.random.Generator, tuple[int, int]], Any]
    damage: Callable[[np.random.Generator, Any, str], Any]
    draw: Callable[[Any], F32]
    defects: tuple[str, ...]


_KINDS: dict[str, _Kind] = {
    "zipper": _Kind(1, zipper.make, zipper_defects.damage, zipper.draw, tuple(sorted(zipper_defects.DEFECTS))),
    "weave": _Kind(2, weave.make, weave.damage, weave.draw, weave.DEFECTS),
}

DEMO_CATEGORIES: tuple[str, ...] = tuple(sorted(_KINDS))
"""Names that `write_demo` knows."""


def defect_types(category: str) -> tuple[str, ...]:
    """Return the defect types of a demo category, sorted."""
    return _kind(category).defects


def render(
    category: str, size: tuple[int, int], *key: int, defect: str | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one picture.

    Args:
        category: one of `DEMO_CATEGORIES`.
        size: (height, width) in pixels.
        key: integers that name the picture; the same key gives the same picture.
        defect: a defect type of the category, None for a flawless picture.

    Returns:
        The picture (uint8 H x W gray or H x W x 3 RGB) and its mask (bool H x W, True where damaged).

    Raises:
        ConfigError: unknown category or defect type, or a size under 64 pixels.
    """
    kind = _kind(category)
    if defect is not None and defect not in kind.defects:
        raise ConfigError(
            f"The demo category {category!r} has no defect type {defect!r}.",
            cure="use one of: " + ", ".join(kind.defects),
        )
    _check_size(size)
    which = 0 if defect is None else 1 + kind.defects.index(defect)
    # Damage may be invisible by chance (a stump as long as the tooth): then draw another.
    for attempt in range(20):
        stream = streams(kind.number, which, attempt, *key)
        scene = kind.make(stream.scene, size)
        clean = kind.draw(scene)
        camera = Camera.take(stream.camera, clean.shape, min(clean.shape[:2]) / 512.0)
        clean_seen = camera.focus(clean)
        if defect is None:
            return to_uint8(reduce_to(camera.expose(clean_seen), size)), np.zeros(size, np.bool_)
        seen = camera.focus(kind.draw(kind.damage(stream.defect, scene, defect)))
        mask = change_mask(reduce_to(clean_seen, size), reduce_to(seen, size))
        if mask.any():
            return to_uint8(reduce_to(camera.expose(seen), size)), mask
    raise AssertionError(f"no visible {defect} in twenty drawings of {category}")


def write_demo(
    root: str | Path,
    category: str = "zipper",
    size: tuple[int, int] = (512, 512),
    train: int = 60,
    test_good: int = 12,
    per_defect: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Category:
    """Write a synthetic category under `root` in the MVTec AD layout and return it.

    The folder appears only when it is complete. One that is already there with the same parameters
    and unchanged files is used as it is; one drawn with other parameters is replaced; a folder that
    this function did not write, or to which files were added, is never touched.

    Args:
        root: folder that holds the categories.
        category: one of `DEMO_CATEGORIES`.
        size: (height, width) of every picture, at least 64 each.
        train: flawless pictures for training.
        test_good: flawless pictures for testing.
        per_defect: damaged pictures of each defect type, each with a mask.
        seed: everything drawn follows from it.
        progress: called after each picture.

    Returns:
        The category, `synthetic=True`.

    Raises:
        ConfigError: unknown category, impossible size or counts.
        DataError: the folder holds something else.
        StorageError: the disk is full or not writable; nothing is left half-written.
    """
    kind = _kind(category)
    _check_size(size)
    if train < 1 or min(test_good, per_defect) < 0 or seed < 0:
        raise ConfigError(
            f"Cannot draw {train} training, {test_good} normal test and {per_defect} pictures per defect, seed {seed}.",
            "At least one training picture is needed, and no count or seed may be negative.",
            "choose e.g. train=60, test_good=12, per_defect=4, seed=0",
        )
    target = Path(root) / category
    parameters = {
        "version": DRAWING_VERSION,
        "category": category,
        "size": list(size),
        "train": train,
        "test_good": test_good,
        "per_defect": per_defect,
        "seed": seed,
    }
    if target.exists() and _reusable(target, parameters):
        return find_category(root, category)
    plan = list(_plan(kind, train, test_good, per_defect))
    with atomic_directory(target) as folder:
        written: list[Path] = []
        for done, (picture_path, mask_path, split, index, defect) in enumerate(plan, start=1):
            picture, mask = render(category, size, seed, split, index, defect=defect)
            written.append(_save(folder / picture_path, picture))
            if mask_path is not None:
                written.append(_save(folder / mask_path, mask.astype(np.uint8) * np.uint8(255)))
            if progress is not None:
                progress(done, len(plan))
        stamp = {
            "synthetic": True,
            "note": "Drawn by saae, not photographed.",
            "parameters": parameters,
            "files": {path.relative_to(folder).as_posix(): sha256_file(path) for path in written},
        }
        (folder / SYNTHETIC_STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return find_category(root, category)


def _plan(
    kind: _Kind, train: int, test_good: int, per_defect: int
) -> Iterator[tuple[str, str | None, int, int, str | None]]:
    """Yield (picture path, mask path, split number, index, defect) of every picture in the set."""
    for index in range(train):
        yield f"train/good/{index:03d}.png", None, 0, index, None
    for index in range(test_good):
        yield f"test/good/{index:03d}.png", None, 1, index, None
    for defect in kind.defects:
        for index in range(per_defect):
            yield f"test/{defect}/{index:03d}.png", f"ground_truth/{defect}/{index:03d}_mask.png", 2, index, defect


def _save(path: Path, array: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Sensor noise hardly compresses: the lowest level costs a few per cent in size and saves most of the time.
    Image.fromarray(array).save(path, compress_level=1)
    return path


def _kind(category: str) -> _Kind:
    try:
        return _KINDS[category]
    except KeyError:
        raise ConfigError(
            f"There is no demo category {category!r}.",
            "Only a few products are drawn.",
            "use one of: " + ", ".join(DEMO_CATEGORIES),
        ) from None


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < SMALLEST or max(size) > 8192:
        raise ConfigError(
            f"Demo pictures of {size[0]} x {size[1]} pixels cannot be drawn.",
            f"Each side has to be between {SMALLEST} and 8192 pixels.",
            "use e.g. 512 x 512",
        )


def _reusable(target: Path, parameters: dict[str, Any]) -> bool:
    """Whether `target` is exactly the wanted set; DataError when it is not ours to replace."""
    foreign = DataError(
        f"{target} is already there and was not drawn by saae (or files were added to it).",
        "The demo never replaces your own images.",
        "choose another folder for the demo, or move that one away",
    )
    stamp_path = target / SYNTHETIC_STAMP
    try:
        stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
        files, drawn_with = dict(stamp["files"]), stamp["parameters"]
    except FileNotFoundError:
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise foreign from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise foreign from error
    there = {p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir()}
    if there - set(files) - {SYNTHETIC_STAMP}:
        raise foreign
    if drawn_with != parameters or there != set(files) | {SYNTHETIC_STAMP}:
        return False
    try:
        return all(sha256_file(target / name) == digest for name, digest in files.items())
    except OSError as error:
        raise StorageError(f"{target} cannot be read.", str(error), "check its permissions") from error
