"""Files of lines that grow for months: one writer at a time, rotation by size or day, repair of a cut-off last line."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO

from .errors import ConfigError
from .files import short_name, storage_error
from .locks import alone

__all__ = ["LineFile", "Rotation", "side_file"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
_TAIL = 1 << 20


@dataclass(frozen=True)
class Rotation:
    """When to start a new file, and how many old ones to keep. size: bytes; None: every day."""

    size: int | None
    keep: int

    @classmethod
    def parse(cls, text: str, keep: int, option: str = "--rotate ") -> Rotation:
        """`day`, or a size such as 100MB.

        Raises:
            ConfigError: neither; `option` is how the text was given.
        """
        found = re.fullmatch(r"(\d{1,12})\s*([kmg]?)i?b?", text.strip().lower())
        if text.strip().lower() == "day":
            return cls(None, keep)
        if found is None or int(found[1]) == 0:
            raise ConfigError(f"{option}{text}: neither a size nor `day`.", "", f"{option}100MB, or {option}day")
        return cls(int(found[1]) * _UNITS[found[2]], keep)


class LineFile:
    """Lines of bytes, each written at once, so that a reader of the file or pipe never sees half a line.

    Lines are appended to the file. A second writer is refused: this one holds `.NAME.lock` beside the file while it is
    open, and the system releases it however the process ends. A device or a pipe is not locked, cut or rotated.

    Args:
        path: the file (folders made).
        ours: prefix of our lines: an incomplete last line with this prefix is cut off when the file is opened, another
            one gets a line end. Empty: any incomplete line is cut off.
        cure: advice for the second writer.
        overwrite: empty the file first.
        rotation: when to begin a new file: NAME becomes NAME.1, that NAME.2, and so on.
        header: the first line of every new file.

    Attributes:
        plain: whether it is a regular file.

    Raises:
        ConfigError: another process writes this file.
        StorageError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        ours: bytes = b"",
        cure: str = "",
        overwrite: bool = False,
        rotation: Rotation | None = None,
        header: bytes = b"",
    ) -> None:
        self.path = path
        self._ours, self._header, self._rotation = ours, header, rotation
        self._file: IO[bytes] | None = None
        self._end = 0
        self._day = date.today()
        self._stack = ExitStack()
        self.plain = not path.exists() or path.is_file()
        try:
            if self.plain:
                self._stack.enter_context(alone(side_file(path, "lock"), f"Writing {path}", cure))
            self._open(overwrite)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, overwrite: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.plain:
                self._file = self.path.open("wb", buffering=0)
                return
            if self.path.exists():
                self._day = date.fromtimestamp(self.path.stat().st_mtime)
            self._file = self.path.open("ab+", buffering=0)
            self._end = self._file.seek(0, os.SEEK_END)
            self._mend()
            if overwrite:
                self._file.truncate(0)
                self._end = 0
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _mend(self) -> None:
        """Repair an incomplete last line after a power cut: cut off ours, end another's."""
        assert self._file is not None
        if self._end == 0:
            return
        begin = max(0, self._end - _TAIL)
        self._file.seek(begin)
        tail = self._file.read(self._end - begin)
        half = tail[tail.rfind(b"\n") + 1 :]
        if not half:
            return
        if half.startswith(self._ours[: len(half)]):
            self._file.truncate(self._end - len(half))
        else:
            self._file.write(b"\n")
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, line: bytes) -> None:
        """Write complete lines, and hand them to the system at once.

        Raises:
            StorageError: the disk is full; earlier lines stay complete, and the next call tries again.
            BrokenPipeError: the reader of the pipe has closed it.
        """
        if self._file is None:
            self._open(overwrite=False)
        if self._due(len(line)):
            self._turn_over()
        assert self._file is not None
        try:
            rest = memoryview(self._header + line if self._end == 0 else line)
            length = len(rest)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._end += length
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):  # a device or pipe cannot be cut
                self._file.truncate(self._end)
            raise storage_error(self.path, error) from error

    @property
    def end(self) -> int:
        """Bytes of complete lines."""
        return self._end

    def cut(self, end: int) -> None:
        """Take back the lines behind `end`, an earlier value of the property.

        Raises:
            StorageError: it failed, and they are still there.
        """
        assert self._file is not None
        try:
            self._file.truncate(end)
            self._end = end
        except OSError as error:
            raise storage_error(self.path, error) from error

    def sync(self) -> None:
        """Sync the file to disk.

        Raises:
            StorageError: it failed.
        """
        if self._file is None or not self.plain:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self.path, error) from error

    def tail(self, count: int) -> list[bytes]:
        """At most this many last lines, also from rotated files; the latest last."""
        found = _last_lines(self.path, count) if self.path.is_file() else []
        for number in range(1, 1 + (self._rotation.keep if self._rotation is not None else 0)):
            older = self.path.with_name(f"{self.path.name}.{number}")
            if len(found) >= count or not older.is_file():
                break
            found = [*_last_lines(older, count - len(found)), *found]
        return found

    def _due(self, more: int) -> bool:
        if self._rotation is None or not self.plain or self._end == 0:
            return False
        if self._rotation.size is None:
            return date.today() != self._day
        return self._end + more > self._rotation.size

    def _turn_over(self) -> None:
        assert self._rotation is not None
        assert self._file is not None
        try:
            old = [self.path.with_name(f"{self.path.name}.{number}") for number in range(self._rotation.keep, 0, -1)]
            for newer, older in zip((*old[1:], self.path), old, strict=True) if old else ():
                with suppress(FileNotFoundError):
                    newer.replace(older)
            if not old:
                self.path.unlink(missing_ok=True)
            for number in range(self._rotation.keep + 1, self._rotation.keep + 100):  # an earlier run kept more
                extra = self.path.with_name(f"{self.path.name}.{number}")
                if not extra.exists():
                    break
                extra.unlink()
        except OSError as error:
            raise storage_error(self.path, error) from error
        self._file.close()
        self._file = None
        self._end, self._day = 0, date.today()
        self._open(overwrite=False)
        self._day = date.today()

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
        self._stack.close()


def _last_lines(path: Path, count: int) -> list[bytes]:
    with path.open("rb") as stream:
        at = stream.seek(0, os.SEEK_END)
        data = b""
        while at > 0 and data.count(b"\n") <= count:
            step = min(at, _TAIL)
            at = stream.seek(at - step)
            data = stream.read(step) + data
    lines = data.splitlines()
    return lines[-count:] if count else []


def side_file(path: Path, kind: str) -> Path:
    """A hidden file beside one: `.NAME.KIND`."""
    return path.with_name(f".{short_name(path.name, len(kind) + 2)}.{kind}")
