"""The spool: ordered records on disk, from which every sink reads at its own pace, across kills and restarts."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import ConfigError, StorageError
from ..files import storage_error
from ..locks import alone
from .spool_reader import Reader, read_cursor
from .spool_records import LARGEST, cut_off, frame, records_of

__all__ = ["Segment", "Spool", "SpoolStats"]

_SUFFIX = ".log"
_SEGMENT = 16 << 20  # bytes
_IN_MEMORY = 16 << 20  # bytes that wait in memory while the disk is full
_REMEMBERED = 20_000  # keys of the latest records, to skip repeated parts


@dataclass(frozen=True)
class SpoolStats:
    """What the spool holds and has lost.

    Attributes:
        records: added since it was opened.
        bytes: on disk now.
        waiting: in memory, because the disk is full.
        lost: dropped, because the disk was full for too long.
        doubled: repeated records that were skipped.
        damaged: records that could not be read, so far.
    """

    records: int
    bytes: int
    waiting: int
    lost: int
    doubled: int
    damaged: int


@dataclass
class Segment:
    """A file of the spool: its first record's number, its bytes, one past its last record's number."""

    path: Path
    first: int
    size: int
    after: int


class Spool:
    """Append-only files of records, each with a checksum.

    `append` writes a record at once, so that a killed process loses none. Files are synced every `sync_seconds`, which
    limits what a power cut loses (0: each record, before `append` returns). An incomplete record at the end is cut off
    when the spool is opened. A damaged record is passed over and counted, and those behind it are read. A file is
    removed once every reader has taken its records. Beyond `limit`, the oldest files are removed, and readers that had
    not taken them count the lost records. While the disk is full, records wait in memory, up to 16 MiB, without an
    error in `append`.

    Args:
        folder: created if missing; used by one process at a time.
        limit: bytes on disk.
        sync_seconds: see above.

    Raises:
        ConfigError: another process uses the folder.
        StorageError: it may not be written to.
    """

    def __init__(self, folder: Path, limit: int = 1 << 30, sync_seconds: float = 1.0) -> None:
        self._folder = folder
        self._limit = limit
        self._segment_size = min(_SEGMENT, max(limit // 8, 1 << 16))
        self._sync_seconds = sync_seconds
        self._changed = threading.Condition()
        self._sync_lock = threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._keys: set[int] = set()
        self._latest_keys: deque[int] = deque()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = 0
        self._records = self._lost = self._doubled = 0
        self._damaged: dict[int, int] = {}  # number behind damaged records, and how many; each reader passes them
        self._dirty = self._closed = False
        self._old: list[int] = []  # full files that are not synced yet
        self.last_error: StorageError | None = None
        self._stack = ExitStack()
        self._stack.enter_context(alone(folder / "lock", f"Using the spool {folder}", "give each line its own spool"))
        try:
            self._segments = self._scan()
            self._file = self._open_last()
        except OSError as error:
            self._stack.close()
            raise storage_error(folder, error) from error
        except BaseException:
            self._stack.close()
            raise
        self._syncer = threading.Thread(target=self._sync_often, name="spool-sync", daemon=True)
        self._syncer.start()

    @property
    def end(self) -> int:
        """Number of the next record."""
        return self._segments[-1].after

    @property
    def stats(self) -> SpoolStats:
        """Counts of the spool."""
        with self._changed:
            size = sum(segment.size for segment in self._segments)
            damaged = sum(self._damaged.values())
            return SpoolStats(self._records, size, len(self._waiting), self._lost, self._doubled, damaged)

    def append(self, key: str, payload: bytes) -> bool:
        """Add a record. A full disk is no error, see the class.

        Args:
            key: of the record; repeats of the latest 20,000 keys are skipped.
            payload: its JSON, one line, at most 8 MiB; its `key` is the same.

        Returns:
            Whether it is new.

        Raises:
            ConfigError: too long, or the spool is closed.
        """
        if len(payload) > LARGEST:
            raise ConfigError(f"A record of {len(payload)} bytes is too long.", "", f"at most {LARGEST} are kept")
        with self._changed:
            if self._closed:
                raise ConfigError("The spool is closed.")
            if _digest(key) in self._keys:
                self._doubled += 1
                return False
            self._remember(key)
            self._records += 1
            self._waiting.append((key, payload))
            self._waiting_bytes += len(payload)
            self._write_waiting()
            while self._waiting_bytes > _IN_MEMORY:
                self._waiting_bytes -= len(self._waiting.popleft()[1])
                self._lost += 1
        if self._sync_seconds == 0:
            self._sync()
        return True

    def reader(self, name: str) -> Reader:
        """Open the reader of a name at its last commit; a new one begins with the next record."""
        with self._changed:
            if name in self._readers:
                raise ConfigError(f"The spool has a reader named {name} already.")
            reader = Reader(self, name, self._folder / f"{name}.cursor")
            self._readers[name] = reader
        return reader

    def close(self) -> None:
        """Write everything to the disk and close. May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._write_waiting()
            self._lost += len(self._waiting)
            self._closed = True
            self._changed.notify_all()
        self._syncer.join()
        self._sync()
        for reader in self._readers.values():
            reader.close()
        os.close(self._file)
        self._stack.close()

    # --- writing; the lock is held ---

    def _remember(self, key: str) -> None:
        digest = _digest(key)
        if digest in self._keys:
            return
        self._keys.add(digest)
        self._latest_keys.append(digest)
        if len(self._latest_keys) > _REMEMBERED:
            self._keys.discard(self._latest_keys.popleft())

    def _write_waiting(self) -> None:
        wrote = False
        while self._waiting:
            payload = self._waiting[0][1]
            try:
                if self._segments[-1].size >= self._segment_size:
                    self._roll()
                self._write(payload)
            except OSError as error:
                self.last_error = storage_error(self._folder, error)
                break
            self._waiting.popleft()
            self._waiting_bytes -= len(payload)
            wrote = True
        if wrote:
            self._dirty = True
            self._shrink()
            self._changed.notify_all()

    def _write(self, payload: bytes) -> None:
        last = self._segments[-1]
        data = frame(last.after, payload)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, last.size)
            raise
        last.size += len(data)
        last.after += 1

    def _roll(self) -> None:
        number = self._segments[-1].after
        path = self._folder / f"{number:020d}{_SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._old.append(self._file)  # `append` does not wait for the disk
        self._file = file
        self._segments.append(Segment(path, number, 0, number))

    def _shrink(self) -> None:
        """Remove files that all readers have read, and the oldest ones beyond the limit."""
        wanted = min((reader.committed for reader in self._readers.values()), default=self._segments[-1].after)
        total = sum(segment.size for segment in self._segments)
        while len(self._segments) > 1 and (self._segments[0].after <= wanted or total > self._limit):
            first = self._segments.pop(0)
            total -= first.size
            for reader in self._readers.values():
                reader.lose_before(first.after)
            with suppress(OSError):
                first.path.unlink()

    # --- syncing ---

    def _sync_often(self) -> None:
        pause = max(self._sync_seconds, 0.1) if self._sync_seconds else 1.0
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait_for(lambda: self._closed, pause)
                if self._closed:
                    return
                self._write_waiting()
            self._sync()

    def _sync(self) -> None:
        with self._sync_lock:
            with self._changed:
                old, self._old = self._old, []
                current, dirty, self._dirty = self._file, self._dirty, False
            try:
                for file in (*old, *([current] if dirty else [])):
                    os.fsync(file)
            except OSError as error:
                self.last_error = storage_error(self._folder, error)
            finally:
                for file in old:
                    os.close(file)

    # --- opening ---

    def _scan(self) -> list[Segment]:
        found = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.stem.isdigit() and path.is_file():
                found.append(Segment(path, int(path.stem), path.stat().st_size, int(path.stem)))
        for one, two in pairwise(found):
            one.after = two.first
        for segment in found[-2:]:
            number, size = segment.first, 0
            for record, end in records_of(segment.path, segment.first):
                self.note_damaged(number, record.number)
                number, size = record.number + 1, end
                with suppress(ValueError, AttributeError):
                    self._remember(record.key)
            if segment is not found[-1]:
                self.note_damaged(number, segment.after)
                continue
            segment.after = number
            if size < segment.size and cut_off(segment.path, size):
                os.truncate(segment.path, size)
                segment.size = size
        if found and size < segment.size:  # the last record is damaged: the next one goes to a new file, behind it
            self.note_damaged(number, number + 1)
            segment.after = number + 1
            found.append(self._made(number + 1))
        if not found:
            # Cursors of readers outlive the records; numbers must not start again below them.
            first = max((read_cursor(path)[0] for path in self._folder.glob("*.cursor")), default=1)
            found.append(self._made(max(first, 1)))
        return found

    def _made(self, number: int) -> Segment:
        path = self._folder / f"{number:020d}{_SUFFIX}"
        path.touch()
        return Segment(path, number, 0, number)

    def _open_last(self) -> int:
        return os.open(self._segments[-1].path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    # --- for readers ---

    def note_damaged(self, first: int, behind: int) -> None:
        """Count the records from one number up to another as damaged, once; the lock is held."""
        if first < behind:
            self._damaged[behind] = max(self._damaged.get(behind, 0), behind - first)

    def segment_of(self, number: int) -> Segment:
        """The file that holds a record, or that the next one goes to; the lock is held."""
        return next((segment for segment in self._segments if number < segment.after), self._segments[-1])


def _digest(key: str) -> int:
    """A key in 64 bits. With 20,000 of them in memory, one in 10^15 records is wrongly taken for a repeat."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
