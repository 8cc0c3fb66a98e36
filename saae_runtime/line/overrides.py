"""Verdicts overridden by people, and the pool of images that they confirmed as good or bad."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import render
from ..appending import LineFile
from ..errors import ConfigError, DataError, shown
from ..files import open_regular, sha256_bytes, write_bytes
from .part import Verdict, now, stamp

__all__ = ["POOL_KINDS", "Override", "Overrides", "called_defective", "pool_folder"]

POOL_KINDS = {"OK": "good", "NG": "bad"}
"""Verdict -> folder in the pool."""

_FILE = "overrides.jsonl"
_REMEMBERED = 10_000
_LONGEST_NOTE = 500
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Override:
    """A person's verdict on a part.

    Attributes:
        key, part_id, station, recipe, bundle, score, threshold: of the part.
        was: the line's verdict.
        verdict: the person's; the same as `was` if they confirm it.
        who, time: the person, and the time, UTC.
        note: the person's remark.
        picture: the image's name in the pool; None if it could not be kept, for the reason `why`.
        undone_by, undone: who undid it, and when; None if it stands.
        archived: the image's name in the archive, as the record has it; None if none was kept there.
    """

    key: str
    part_id: str
    station: str
    recipe: str | None
    bundle: str | None
    score: float | None
    threshold: float | None
    was: str
    verdict: str
    who: str
    time: str
    note: str = ""
    picture: str | None = None
    why: str = ""
    undone_by: str | None = None
    undone: str | None = None
    archived: str | None = None


class Overrides:
    """Keeps overrides in one file, one line per change, synced before the call returns, and the pool beside it.

    The record of the part is never changed. The latest 10,000 overrides are in memory: reading them never waits for the
    disk. Thread-safe.

    Args:
        folder: for `overrides.jsonl` and `pool/RECIPE/good|bad/`; created if missing.
        pool_mb: size of the pool in megabytes; beyond it, overrides count but their images are not kept.

    Raises:
        ConfigError: another process uses the folder.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, pool_mb: float = 5000.0) -> None:
        self._folder = folder
        self._limit = pool_mb * 1e6
        self._changing = threading.Lock()  # one change at a time, while its picture is made and the disk is waited for
        self._lock = threading.Lock()  # of `_known` alone: whoever reads it does not wait for a change
        self._file = LineFile(folder / _FILE, cure="give each line its own folder")
        self._known: OrderedDict[str, Override] = OrderedDict()
        for line in self._file.tail(2 * _REMEMBERED):
            if (item := _read(line)) is not None:
                self._remember(item)
        self._size = _size(folder / "pool")

    def mark(
        self,
        part: Mapping[str, Any],
        verdict: Verdict,
        who: str,
        note: str = "",
        frame: NDArray[np.uint8] | None = None,
        no_frame: str = "",
    ) -> Override:
        """Record a person's verdict on a part.

        Args:
            part: its record, `saae_runtime.line.part.Part.to_dict`.
            verdict: what it really is.
            who: the person.
            note: a remark, at most 500 characters.
            frame: the part's frame, for the pool.
            no_frame: why there is no frame.

        Raises:
            ConfigError: it is overridden already; undo that override first.
            StorageError: it could not be saved, and does not count.
        """
        if len(note) > _LONGEST_NOTE or not all(letter.isprintable() or letter == "\n" for letter in note):
            raise ConfigError("The note is invalid.", "", f"at most {_LONGEST_NOTE} characters of plain text")
        with self._changing:
            before = self.get(part["key"])
            if before is not None:
                raise ConfigError(
                    f"Part {shown(part['part_id'])} is overridden already, by {before.who}.",
                    "",
                    "undo that override first",
                )
            made = Override(
                key=part["key"],
                part_id=part["part_id"],
                station=part["station"],
                recipe=part["recipe"],
                bundle=part["bundle"],
                score=part["score"],
                threshold=part["threshold"],
                was=part["verdict"],
                verdict=verdict.value,
                who=who,
                time=stamp(now()),
                note=note,
                archived=part["picture"],
            )
            made = self._with_picture(made, frame, no_frame)
            try:
                self._write(made)
            except BaseException:
                self._remove_picture(made)
                raise
        return made

    def undo(self, key: str, who: str) -> Override:
        """Undo an override and remove its image.

        Raises:
            DataError: there is none of this key, or it is undone already.
            StorageError: it could not be written, and the override still stands.
        """
        with self._changing:
            before = self.get(key)
            if before is None:
                raise DataError(f"There is no override of {shown(key, 200)}.", "", "GET /v1/overrides lists them")
            after = replace(before, undone_by=who, undone=stamp(now()), picture=None)
            self._write(after)
            self._remove_picture(before)
        return after

    def get(self, key: str) -> Override | None:
        """The override of a part; None if there is none."""
        with self._lock:
            found = self._known.get(key)
        return found if found is not None and found.undone is None else None

    def latest(self, count: int) -> list[dict[str, Any]]:
        """At most this many overrides that were made or undone last, the latest first."""
        with self._lock:
            found = list(self._known.values())[-count:] if count else []
        return [asdict(item) for item in reversed(found)]

    def pool(self, recipe: str) -> dict[str, int]:
        """Number of images in the pool of a recipe: `good` and `bad`."""
        folder = self._folder / "pool" / recipe
        return {
            kind: sum(1 for item in (folder / kind).iterdir() if item.suffix == ".png")
            if (folder / kind).is_dir()
            else 0
            for kind in POOL_KINDS.values()
        }

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._changing:
            self._file.close()

    # --- inside, during a change ---

    def _with_picture(self, made: Override, frame: NDArray[np.uint8] | None, no_frame: str) -> Override:
        if frame is None or made.recipe is None:
            return replace(made, why=no_frame or "the part's frame is no longer in memory")
        data = render.encode_png(frame)
        if self._size + len(data) > self._limit:
            return replace(made, why="the pool is full")
        label = _UNSAFE.sub("_", made.part_id)[:60] or "part"
        name = f"{made.recipe}/{POOL_KINDS[made.verdict]}/{label}.{sha256_bytes(made.key.encode())[:16]}.png"
        write_bytes(self._folder / "pool" / name, data)
        self._size += len(data)
        return replace(made, picture=name)

    def _remove_picture(self, item: Override) -> None:
        if item.picture is None:
            return
        root = (self._folder / "pool").resolve()
        path = (root / item.picture).resolve()
        if root not in path.parents:  # the file was edited
            return
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            self._size -= size

    def _write(self, item: Override) -> None:
        self._file.write(json.dumps(asdict(item), allow_nan=False).encode("ascii") + b"\n")
        self._file.sync()
        self._remember(item)

    def _remember(self, item: Override) -> None:
        with self._lock:
            self._known.pop(item.key, None)
            self._known[item.key] = item
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def pool_folder(folder: Path, recipe: str, verdict: Verdict = Verdict.OK) -> Path:
    """Folder of the images that people confirmed as OK (or NG) parts of a recipe.

    Args:
        folder: of the overrides.
        recipe: a recipe's name in line.toml.
        verdict: OK or NG.
    """
    return folder / "pool" / recipe / POOL_KINDS[verdict.value]


def called_defective(folder: Path) -> frozenset[str]:
    """The archive's images of parts that a person called defective, by their names in the records, however long ago.

    Args:
        folder: of the overrides; a running service may write there.

    Raises:
        ConfigError: its file cannot be read.
    """
    found: dict[str, str] = {}
    try:
        with open_regular(folder / _FILE) as stream:
            for line in stream:
                item = _read(line)
                if item is None:
                    continue
                found.pop(item.key, None)
                if isinstance(item.archived, str) and item.verdict == Verdict.NG.value and item.undone is None:
                    found[item.key] = item.archived
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise ConfigError(f"{folder / _FILE} cannot be read.", str(error), "check path and permissions") from error
    return frozenset(found.values())


def _read(line: bytes) -> Override | None:
    """The override in a line; None for a line of another version."""
    try:
        return Override(**json.loads(line))
    except (ValueError, TypeError, KeyError):
        return None


def _size(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*.png") if item.is_file()) if folder.is_dir() else 0
