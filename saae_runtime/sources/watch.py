"""Pictures that appear in folders: each is given once, and only when it is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..errors import ConfigError, DataError, DeviceError, ImageError
from ..images import read_image
from .files import Frame, Source, images_below, unique_stem

__all__ = ["PATIENCE", "SETTLE", "FolderWatch"]

SETTLE = 0.5
"""Seconds without a change of size or time after which a file counts as written."""

PATIENCE = 5.0
"""Seconds after which a file that cannot be read is reported, and a folder that cannot be listed counts as gone."""

_POLL = 0.2  # seconds between two looks


@dataclass
class _Waiting:
    """A file that was seen and not given yet: its size and time, since when they are these, whether it was tried."""

    state: tuple[int, int]
    since: float
    tried: bool = False


class FolderWatch:
    """Looks again and again for pictures in folders, those that are there at first included.

    Polling works on every file system, network shares among them. A name is given once, as long as the file is there;
    removed and written again, it is a new picture. Names that start with a dot are passed over, so a program that
    writes `.x.png` and renames it is always safe.

    Args:
        names: the folders.
        recursive: whether folders below them are watched too.

    Raises:
        ConfigError: a name that is no folder.
    """

    def __init__(self, names: Sequence[str], recursive: bool = False) -> None:
        self._folders: list[tuple[Path, PurePath]] = []
        for name in names:
            folder = Path(name)
            if not folder.is_dir():
                raise ConfigError(
                    f"--watch {name}: not a folder.",
                    "Pictures can only be added to a folder.",
                    "name the folder that the camera writes to; without --watch, files and videos can be named",
                )
            # As in `find_sources`: two folders may hold the same names.
            self._folders.append((folder, PurePath(folder.resolve().name) if len(names) > 1 else PurePath()))
        self._recursive = recursive
        self._white_level: int | None = None
        self._waiting: dict[Path, _Waiting] = {}
        self._given: dict[Path, str] = {}  # to the stem that it was filed under, in lower case
        self._stems: set[str] = set()
        self._failing: float | None = None

    def frames(self, stop: threading.Event, white_level: int | None = None) -> Iterator[Frame]:
        """Frames as they come, until `stop` is set; `white_level` is that of 16-bit files.

        Raises:
            DeviceError: a folder could not be listed for `PATIENCE` seconds.
        """
        self._white_level = white_level
        while not stop.is_set():
            for frame in self.poll(time.monotonic()):
                yield frame
                if stop.is_set():
                    return
            # Not stop.wait(): the signal handler sets `stop` on this very thread, which must not hold its lock.
            time.sleep(_POLL)

    def poll(self, now: float) -> Iterator[Frame]:
        """One look: what has become whole since the last one, by name; an error for what cannot be read.

        Args:
            now: seconds of a clock that never goes back.

        Raises:
            DeviceError: as `frames`.
        """
        try:
            present = self._list()
        except OSError as error:
            self._failing = now if self._failing is None else self._failing
            if now - self._failing >= PATIENCE:
                raise DeviceError(
                    "A watched folder has gone.",
                    str(error),
                    "check the disk or the network share, then start again",
                ) from error
            return
        self._failing = None
        for path in [path for path in self._given if path not in present]:
            self._stems.discard(self._given.pop(path))  # memory must not grow for months
        for path in [path for path in self._waiting if path not in present]:
            del self._waiting[path]
            yield self._frame(path, PurePath(path.stem), _gone(path))
        for path, stem in present.items():
            if path not in self._given and (frame := self._look(path, stem, now)) is not None:
                yield frame

    def _list(self) -> dict[Path, PurePath]:
        def fail(error: OSError) -> None:
            raise error

        return {
            path: prefix / path.relative_to(folder).with_suffix("")
            for folder, prefix in self._folders
            for path in images_below(folder, self._recursive, fail)
        }

    def _look(self, path: Path, stem: PurePath, now: float) -> Frame | None:
        try:
            facts = path.stat()
        except OSError:  # gone since it was listed; the next look says so
            self._waiting.setdefault(path, _Waiting((-1, 0), now))
            return None
        state = (facts.st_size, facts.st_mtime_ns)
        waiting = self._waiting.get(path)
        if waiting is None or waiting.state != state:
            self._waiting[path] = _Waiting(state, now)
            return None
        last = now - waiting.since >= PATIENCE
        if not last and (waiting.tried or now - waiting.since < SETTLE):
            return None
        try:
            image = read_image(path, self._white_level)
        except ImageError as error:
            # Perhaps only a pause of the writer.
            waiting.tried = True
            return self._frame(path, stem, error) if last else None
        frame = self._frame(path, stem)
        return Frame(frame.source, 0, image)

    def _frame(self, path: Path, stem: PurePath, error: DataError | None = None) -> Frame:
        """The file's frame, yet without its picture; it is not given again."""
        self._waiting.pop(path, None)
        unique = unique_stem(stem, self._stems)
        self._given[path] = str(unique).lower()
        return Frame(Source("image", str(path), unique, path=path), 0, None, error)


def _gone(path: Path) -> DataError:
    return DataError(
        f"{path}: gone before it was whole.",
        "It was removed, moved or renamed just after it had appeared, so it was not scored.",
        "move pictures away once they were scored; write them under a name that starts with a dot, then rename",
    )
