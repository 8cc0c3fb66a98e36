"""Keeps images of parts on disk, OK and NG apart. A full disk loses images, but no verdict."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import render
from ..errors import SaaeError
from ..files import encodable, short_name, write_bytes
from ..meter import one_line
from ..result import Result
from .ages import Ages
from .config import ArchiveConfig
from .part import Part, Verdict, stamp

__all__ = ["Archive", "archived"]

_WAITING_BYTES = 256 << 20  # of waiting frames
_SWEEP = 30.0  # seconds between two checks of ages and sizes
_SWEEP_FULL = 1.0  # the same if there is too much
_PAUSE = 10.0  # seconds without images after a failed write
_JPEG_QUALITY = 92
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NOT_JUDGED = "_"  # in place of a recipe, whose name begins with a letter or digit


def archived(folder: Path, verdict: Verdict, recipe: str | None) -> Path:
    """Where an archive keeps the images of one verdict by one recipe, in a folder for each day.

    Args:
        folder: the archive's.
        verdict: OK or NG.
        recipe: its name; None: parts that were not judged.
    """
    return folder / verdict.value / (recipe or _NOT_JUDGED)


@dataclass(frozen=True, eq=False)
class _Work:
    name: str
    frame: NDArray[np.uint8]
    result: Result | None


@dataclass(frozen=True)
class _Kept:
    path: Path
    size: int
    time: float
    ng: bool


class Archive:
    """Writes images on its own thread, and removes old ones.

    The folder holds `OK/RECIPE/2026-11-25/` and `NG/RECIPE/2026-11-25/` (UTC), with names that begin with the time, so
    that the good images of one product are together. A hash of the part's key decides which OK images are kept. Images
    older than their days are removed; beyond `max_gb`, or with less than `min_free_gb` free on the disk, the oldest OK
    images are removed first, and then the oldest NG ones.

    Args:
        config: `[archive]` of line.toml.
        folder: the archive's folder.
        clock: seconds since 1970, for ages.
        memory: see `saae_runtime.line.ages.Ages`.
    """

    def __init__(
        self,
        config: ArchiveConfig,
        folder: Path,
        clock: Callable[[], float] = time.time,
        memory: Path | None = None,
    ) -> None:
        self._config, self._folder, self._clock, self._memory = config, folder, clock, memory
        self._ages: Ages | None = None
        self._changed = threading.Condition()
        self._work: deque[_Work] = deque()
        self._bytes = 0
        self._busy = self._closed = False
        self._paused_until = 0.0
        self._written = self._left_out = self._removed = 0
        self._size = 0
        self._last_error: str | None = None
        self._swept = float("-inf")
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs; False before `finish` means that it has failed."""
        return self._thread.is_alive() or self._closed

    def plan(self, part: Part) -> str | None:
        """Name of the part's image, relative to the folder; None: none is kept, or there is no room."""
        if part.verdict is Verdict.OK and not self._is_kept(part.key):
            return None
        with self._changed:
            if self._closed or self._bytes > _WAITING_BYTES or time.monotonic() < self._paused_until:
                self._left_out += 1
                return None
        moment = stamp(part.time)
        clock = moment[11:-1].replace(":", "")
        part_id = (_UNSAFE.sub("_", part.part_id) or "part") + (f"_{part.mark}" if part.mark else "")
        name = short_name(f"{clock}_{_UNSAFE.sub('_', part.station)}_{part_id}", 24)
        place = archived(self._folder, part.verdict, part.recipe) / moment[:10]
        return (place / f"{name}.{self._config.format}").relative_to(self._folder).as_posix()

    def put(self, name: str, frame: NDArray[np.uint8], result: Result | None) -> None:
        """Hand over a frame under a name from `plan`; never waits.

        Args:
            name: from `plan`.
            frame: uint8 H x W x 3, not changed any more.
            result: for the overlay of an NG part.
        """
        with self._changed:
            self._work.append(_Work(name, frame, result if self._config.overlays else None))
            self._bytes += frame.nbytes
            self._changed.notify_all()

    def state(self) -> dict[str, Any]:
        """Counts, size in bytes and the latest error."""
        with self._changed:
            return {
                "folder": encodable(str(self._folder)),
                "written": self._written,
                "left_out": self._left_out,
                "removed": self._removed,
                "bytes": self._size,
                "waiting": len(self._work),
                "last_error": self._last_error,
            }

    def finish(self, deadline: float) -> None:
        """Write waiting frames, until `deadline` (`time.monotonic`) at most, and end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._work and not self._busy, max(deadline - time.monotonic(), 0))
            self._closed = True
            self._left_out += len(self._work)
            self._work.clear()
            self._changed.notify_all()
        self._thread.join(max(deadline - time.monotonic(), 0) + 0.2)

    def sweep(self) -> None:
        """Remove images that are too old or too many."""
        kept = self._listed()
        self._size = sum(item.size for item in kept)
        moment = self._aging(kept).now()
        for item in list(kept):
            days = self._config.ng_days if item.ng else self._config.ok_days
            if moment - item.time > days * 86400:
                self._remove(item)
                kept.remove(item)
        kept.sort(key=lambda item: (item.ng, item.time), reverse=True)  # the last one goes first
        limit = self._config.max_gb * 1e9
        while kept and (self._size > limit or self._free() < self._config.min_free_gb * 1e9):
            self._remove(kept.pop())
        self._remove_empty()

    # --- its thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._work or self._closed, _SWEEP)
                if self._closed and not self._work:
                    return
                work = self._work.popleft() if self._work else None
                if work is not None:
                    self._busy = True
                    self._bytes -= work.frame.nbytes
            try:
                if work is not None:
                    self._write(work)
                since = time.monotonic() - self._swept
                if since > _SWEEP or (since > _SWEEP_FULL and self._is_full()):
                    self.sweep()
                    self._swept = time.monotonic()
            except Exception as error:
                self._note(error)

    def _write(self, work: _Work) -> None:
        if time.monotonic() < self._paused_until:
            self._left_out += 1
            return
        pictures = {work.name: lambda: work.frame}
        if work.result is not None and work.result.is_anomalous:
            result = work.result
            pictures[f"{Path(work.name).with_suffix('')}.overlay.{self._config.format}"] = lambda: result.overlay(
                work.frame
            )
        for name, make in pictures.items():
            data = self._encoded(make())
            for last in (False, True):
                try:
                    write_bytes(self._folder / name, data)
                    self._date(self._folder / name)
                    break
                except (SaaeError, OSError) as error:
                    if last:
                        self._left_out += 1
                        self._paused_until = time.monotonic() + _PAUSE
                        self._note(error)
                        return
                    self.sweep()  # there may be room afterwards
                    self._make_room(2 * len(data))
            self._size += len(data)
            self._written += 1

    def _aging(self, kept: list[_Kept] | None = None) -> Ages:
        """The clock for ages; without a memory it begins at the newest of the images."""
        if self._ages is None:
            found = self._listed() if kept is None else kept
            self._ages = Ages(max((item.time for item in found), default=None), self._memory, self._clock)
        return self._ages

    def _date(self, path: Path) -> None:
        """Give a new image the time that its age counts from: the disk gave it that of a clock that may be behind."""
        moment = self._aging().stamp()
        with suppress(OSError):  # a share that takes no times
            os.utime(path, (moment, moment))

    def _make_room(self, size: int) -> None:
        """Remove the oldest images until this many bytes are free."""
        kept = sorted(self._listed(), key=lambda item: (item.ng, item.time), reverse=True)
        while kept and self._free() < size:
            self._remove(kept.pop())

    def _encoded(self, picture: NDArray[np.uint8]) -> bytes:
        if self._config.format == "png":
            return render.encode_png(picture)
        import io

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue()

    def _is_kept(self, key: str) -> bool:
        number = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")
        return number < self._config.ok_share * 2**64

    def _is_full(self) -> bool:
        return self._size > self._config.max_gb * 1e9 or self._free() < self._config.min_free_gb * 1e9

    def _free(self) -> float:
        try:
            return float(shutil.disk_usage(self._folder).free)
        except OSError:
            return float("inf")

    def _listed(self) -> list[_Kept]:
        found = []
        for verdict in Verdict:
            for folder in self._folders(verdict):
                for entry in _entries(folder):
                    with suppress(OSError):
                        if entry.is_file(follow_symlinks=False):
                            facts = entry.stat(follow_symlinks=False)
                            ng = verdict is Verdict.NG
                            found.append(_Kept(Path(entry.path), facts.st_size, facts.st_mtime, ng))
        return found

    def _folders(self, verdict: Verdict) -> list[Path]:
        """Those of recipes and, in them, of days; before recipes had their own, days took their place."""
        recipes = _folders_in(self._folder / verdict.value)
        return [*(day for recipe in recipes for day in _folders_in(recipe)), *recipes]

    def _remove(self, item: _Kept) -> None:
        with suppress(FileNotFoundError):
            item.path.unlink()
        self._size -= item.size
        self._removed += 1

    def _remove_empty(self) -> None:
        for verdict in Verdict:
            for folder in self._folders(verdict):
                with suppress(OSError):  # not empty, the usual case
                    folder.rmdir()

    def _note(self, error: Exception) -> None:
        self._last_error = one_line(error)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _folders_in(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]
