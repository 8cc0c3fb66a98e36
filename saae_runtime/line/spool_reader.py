"""A sink's position in the spool, across kills and restarts."""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import storage_error
from .spool_records import Record, records_in

if TYPE_CHECKING:
    from .spool import Segment, Spool

__all__ = ["Reader", "read_cursor"]

_CURSOR = struct.Struct("<QQI")  # next number, records given up, crc32


class Reader:
    """A sink's position in the spool. Used by one thread; made by `Spool.reader`."""

    def __init__(self, spool: Spool, name: str, path: Path) -> None:
        self.name = name
        self._spool = spool
        self._path = path
        self._lost = 0
        self._damaged: dict[int, int] = {}  # records passed over and not committed yet: number behind them, how many
        self._file: int | None = None
        self._open_segment: Path | None = None
        self._offset = 0
        try:
            new = not path.exists()
            self._cursor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error(path, error) from error
        first = spool._segments[0].first
        committed, self._lost = (spool.end, 0) if new else read_cursor(path)
        if not new and committed == 0:
            committed = first  # unreadable after a power cut: deliver records again rather than not at all
        self.committed = min(max(committed, first), spool.end)
        self._lost += max(first - committed, 0)
        self._next = self.committed
        self._save()

    @property
    def lost(self) -> int:
        """Number of records that this reader never got: removed because the spool was full, or damaged."""
        return self._lost

    @property
    def backlog(self) -> int:
        """Number of records that wait for this reader."""
        return max(self._spool.end - self.committed, 0)

    def read(self, most: int, timeout: float) -> list[Record]:
        """The next records after those that were read.

        Args:
            most: largest number of records.
            timeout: seconds to wait for the first one.

        Raises:
            OSError: the spool's file cannot be opened or read now; no record is passed over for it.
        """
        spool = self._spool
        while True:
            with spool._changed:
                spool._changed.wait_for(lambda: spool._closed or spool.end > self._next, timeout)
                if spool.end <= self._next:
                    return []
                segment = spool.segment_of(self._next)
                size, behind = segment.size, segment.after
                self._enter(segment)
            found: list[Record] = []
            offset = self._offset
            if self._file is not None:
                for record, end in records_in(self._file, self._offset, size, self._next):
                    found.append(record)
                    offset = end
                    if len(found) >= most:
                        break
            self._offset = offset
            with spool._changed:
                for record in found:
                    self._pass_over(record.number)
                    self._next = max(self._next, record.number + 1)
                if found:
                    return found
                if self._next < behind:  # damaged: go on after the records of this file
                    self._pass_over(behind)
                    self._next, self._offset = behind, size

    def _pass_over(self, behind: int) -> None:
        """Count the damaged records from the next one up to another; the lock is held."""
        first = self._next
        if first >= behind:
            return
        self._spool.note_damaged(first, behind)
        self._damaged[behind] = behind - first
        if self.committed == first:
            self._commit(behind)

    def _enter(self, segment: Segment) -> None:
        """Open a file of the spool at the next record; the lock is held."""
        if segment.path == self._open_segment:
            return
        self._close_segment()
        self._open_segment, self._offset = None, 0
        with suppress(FileNotFoundError):  # removed by somebody: its records are gone for good
            self._file = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            for record, end in records_in(self._file, 0, segment.size, segment.first):
                if record.number >= self._next:
                    break
                self._offset = end
        self._open_segment = segment.path

    def commit(self, number: int) -> None:
        """Commit all records up to this one: they are not read again, even after a kill."""
        with self._spool._changed:
            self._commit(number + 1)
            self._spool._shrink()

    def _commit(self, behind: int) -> None:
        self.committed = max(self.committed, behind)
        for end in [end for end in self._damaged if end <= self.committed]:
            self._lost += self._damaged.pop(end)
        self._save()

    def rewind(self) -> None:
        """Read uncommitted records again."""
        with self._spool._changed:
            self._next = self.committed
            self._open_segment = None

    def lose_before(self, number: int) -> None:
        """The records before this one were removed; the spool's lock is held."""
        if self.committed < number:
            self._lost += number - self.committed
            self._damaged = {end: count for end, count in self._damaged.items() if end > number}
            self.committed = number
            self._save()
        self._next = max(self._next, number)

    def _save(self) -> None:
        body = struct.pack("<QQ", self.committed, self._lost)
        try:
            os.pwrite(self._cursor, body + struct.pack("<I", zlib.crc32(body)), 0)
        except OSError as error:  # it is kept in memory; after a kill some records come twice
            self._spool.last_error = storage_error(self._path, error)

    def _close_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._close_segment()
        if self._cursor >= 0:
            os.close(self._cursor)
            self._cursor = -1


def read_cursor(path: Path) -> tuple[int, int]:
    """Next number and lost records; zeros if the file cannot be read."""
    with suppress(OSError):
        data = path.read_bytes()[: _CURSOR.size]
        if len(data) == _CURSOR.size:
            committed, lost, check = _CURSOR.unpack(data)
            if zlib.crc32(data[:16]) == check:
                return int(committed), int(lost)
    return 0, 0
