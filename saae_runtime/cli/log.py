"""The result log: JSON lines, appended by one writer at a time, turned over by size or day; and what was scored."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError
from ..files import alone, short_name, storage_error, write_text
from ..sources.files import Facts
from .outputs import Standard

__all__ = ["JsonLines", "Rotation", "Scored"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
_TAIL = 1 << 20
_REMEMBERED = 500_000  # files that count as scored, the latest


@dataclass(frozen=True)
class Rotation:
    """When a new log is begun, and how many old ones stay. size: bytes, None for by day."""

    size: int | None
    keep: int

    @classmethod
    def parse(cls, text: str, keep: int) -> Rotation:
        """`day`, or a size such as 100MB.

        Raises:
            ConfigError: neither.
        """
        found = re.fullmatch(r"(\d{1,12})\s*([kmg]?)i?b?", text.strip().lower())
        if text.strip().lower() == "day":
            return cls(None, keep)
        if found is None or int(found[1]) == 0:
            raise ConfigError(f"--rotate {text}: neither a size nor `day`.", "", "--rotate 100MB, or --rotate day")
        return cls(int(found[1]) * _UNITS[found[2]], keep)


class JsonLines:
    """One JSON object per line, each written whole: a reader of the file or pipe never sees half a line.

    Lines are appended to what is there. A second run that is given the same file is refused: while this one is open, it
    holds `.NAME.lock` beside it, which the system lets go of however the run ends.

    Args:
        target: a file (folders made), or a `Standard` for standard output.
        overwrite: empty the file first.
        rotation: when to begin a new file: NAME becomes NAME.1, that NAME.2, and so on.

    Raises:
        ConfigError: another run writes this file.
        StorageError: the file cannot be written.
    """

    def __init__(self, target: str | Standard, overwrite: bool = False, rotation: Rotation | None = None) -> None:
        self._standard = target if isinstance(target, Standard) else None
        self._path = None if isinstance(target, Standard) else Path(target)
        self._rotation = rotation
        self._file: IO[bytes] | None = None
        self._end = 0
        self._day = date.today()
        self._stack = ExitStack()
        if self._path is None:
            return
        # A device or a pipe is not locked, cut or turned over.
        self.plain = not self._path.exists() or self._path.is_file()
        try:
            if self.plain:
                what = f"Writing {self._path}"
                lock = side_file(self._path, "lock")
                self._stack.enter_context(alone(lock, what, "give each run a --json FILE of its own"))
            self._open(overwrite)
        except BaseException:
            self._stack.close()
            raise

    plain = False
    """Whether the target is a regular file."""

    def _open(self, overwrite: bool) -> None:
        assert self._path is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self.plain:
                self._file = self._path.open("wb", buffering=0)
                return
            if self._path.exists():
                self._day = date.fromtimestamp(self._path.stat().st_mtime)
            self._file = self._path.open("ab+", buffering=0)
            self._end = self._file.seek(0, os.SEEK_END)
            self._mend()
            if overwrite:
                self._file.truncate(0)
                self._end = 0
        except OSError as error:
            raise storage_error(self._path, error) from error

    def _mend(self) -> None:
        """Ends a line that a power cut has left half-written: ours is cut off, another's is closed."""
        assert self._file is not None
        if self._end == 0:
            return
        begin = max(0, self._end - _TAIL)
        self._file.seek(begin)
        tail = self._file.read(self._end - begin)
        half = tail[tail.rfind(b"\n") + 1 :]
        if not half:
            return
        if half.startswith(b'{"source"'[: len(half)]):
            self._file.truncate(self._end - len(half))
        else:
            self._file.write(b"\n")
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one line and hands it to the system at once.

        Raises:
            StorageError: the disk is full; the lines before this one stay whole, and the next call tries again.
            BrokenPipeError: whoever read standard output has gone.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode("ascii")
        if self._standard is not None:
            self._standard.write(line)
            return
        assert self._path is not None
        if self._file is None:
            self._open(overwrite=False)
        if self._due(len(line)):
            self._turn_over()
        assert self._file is not None
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._end += len(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):  # a device or pipe cannot be cut
                self._file.truncate(self._end)
            raise storage_error(self._path, error) from error

    def _due(self, more: int) -> bool:
        if self._rotation is None or not self.plain or self._end == 0:
            return False
        if self._rotation.size is None:
            return date.today() != self._day
        return self._end + more > self._rotation.size

    def _turn_over(self) -> None:
        assert self._path is not None
        assert self._rotation is not None
        assert self._file is not None
        try:
            old = [self._path.with_name(f"{self._path.name}.{number}") for number in range(self._rotation.keep, 0, -1)]
            for newer, older in zip((*old[1:], self._path), old, strict=True) if old else ():
                with suppress(FileNotFoundError):
                    newer.replace(older)
            if not old:
                self._path.unlink(missing_ok=True)
            for number in range(self._rotation.keep + 1, self._rotation.keep + 100):  # more were kept before
                extra = self._path.with_name(f"{self._path.name}.{number}")
                if not extra.exists():
                    break
                extra.unlink()
        except OSError as error:
            raise storage_error(self._path, error) from error
        self._file.close()
        self._file = None
        self._end, self._day = 0, date.today()
        self._open(overwrite=False)
        self._day = date.today()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            self._file.close()
        self._stack.close()


class Scored:
    """Which files were scored, by absolute path, size and time of change, across restarts.

    Kept in `.NAME.scored` beside the log, a line for each file behind its verdict: a run that is killed in between
    scores one file twice, never none.

    Args:
        log: the result log.
        forget: begin anew.
    """

    def __init__(self, log: Path, forget: bool = False) -> None:
        self._path = side_file(log, "scored")
        self._known: dict[str, Facts] = {}
        self._file: IO[bytes] | None = None
        lines = 0 if forget else self._load()
        try:
            if forget or lines > 2 * len(self._known) + 1000:
                write_text(self._path, "".join(_line(path, facts) for path, facts in self._known.items()))
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise storage_error(self._path, error) from error

    def _load(self) -> int:
        lines = 0
        with suppress(FileNotFoundError), self._path.open("rb") as stream:
            for line in stream:
                lines += 1
                with suppress(ValueError, TypeError, KeyError):  # a line that was cut off
                    path, size, changed = json.loads(line)
                    self._known.pop(path, None)
                    self._known[path] = (int(size), int(changed))
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return lines

    def knows(self, path: str, facts: Facts | None) -> bool:
        """Whether a file with these facts was scored."""
        return facts is not None and self._known.get(path) == tuple(facts)

    def add(self, path: str, facts: Facts) -> None:
        """Takes note of a file.

        Raises:
            StorageError: it cannot be written down; in this run the file is known all the same.
        """
        self._known.pop(path, None)
        self._known[path] = facts
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        try:
            if self._file is not None:
                self._file.write(_line(path, facts).encode("ascii"))
        except OSError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            self._file.close()


def _line(path: str, facts: Facts) -> str:
    return json.dumps([path, *facts]) + "\n"


def side_file(log: Path, kind: str) -> Path:
    """A hidden file beside the log."""
    return log.with_name(f".{short_name(log.name, len(kind) + 2)}.{kind}")
