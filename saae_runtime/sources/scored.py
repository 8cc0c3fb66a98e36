"""Remembers which files were scored, across restarts."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..appending import side_file
from ..files import storage_error, write_text
from .files import Facts

__all__ = ["Scored"]

_REMEMBERED = 500_000  # largest number of remembered files


class Scored:
    """Scored files by absolute path, size and time of change, across restarts.

    Kept in `.NAME.scored` beside the log, with a line per file after its verdict: a run that is killed in between
    scores one file twice, but misses none.

    Args:
        log: the result log.
        forget: start with an empty list.
        looking: change nothing on disk, since another process may be writing the list; only refuse one that could not
            be written.
    """

    def __init__(self, log: Path, forget: bool = False, looking: bool = False) -> None:
        self._path = side_file(log, "scored")
        self._known: dict[str, Facts] = {}
        self._file: IO[bytes] | None = None
        lines = 0 if forget else self._load()
        if looking:
            if self._path.exists() and not os.access(self._path, os.W_OK):
                raise storage_error(self._path, PermissionError(errno.EACCES, "Permission denied"))
            return
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
                with suppress(ValueError, TypeError, KeyError):  # an incomplete line
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
        """Remember a file.

        Raises:
            StorageError: it cannot be saved; this run still knows the file.
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
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()


def _line(path: str, facts: Facts) -> str:
    return json.dumps([path, *facts]) + "\n"
