"""Files: atomic writes, reads of regular files only, hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MARKS",
    "IrregularFileError",
    "LargeFileError",
    "atomic_file",
    "canonical_json",
    "encodable",
    "held",
    "open_regular",
    "read_regular",
    "remove",
    "sha256_bytes",
    "sha256_file",
    "short_name",
    "storage_error",
    "sweep",
    "sync_directory",
    "temporary_name",
    "write_bytes",
    "write_json",
    "write_text",
]

_CHUNK = 1 << 20
_LONGEST_NAME = 255  # bytes
_TEMPORARY = "saae-tmp"
MARKS = len(f"..{'0' * 8}.{_TEMPORARY}")
"""Bytes by which a temporary name is longer than the final name."""
_LEFTOVER = re.compile(rf"\..+\.[0-9a-f]{{8}}\.{_TEMPORARY}", re.DOTALL)
_GRACE = 10.0  # seconds
_swept: set[Path] = set()  # folders cleaned by this process; listing a large folder is slow


class IrregularFileError(OSError):
    """The path is a pipe, a device, a socket or a folder, not a file."""


class LargeFileError(OSError):
    """The file is larger than the limit; `size` is its size in bytes."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} bytes, at most {limit} are read")
        self.size = size


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a regular file, or a link to one, for reading.

    Opening a FIFO could wait for ever, and a device may have no end. They are refused before opening, and again after
    it, in case the file was replaced.

    Raises:
        IrregularFileError: it is not a regular file.
        OSError: it is missing or cannot be opened.
    """
    file = Path(path)
    _require_regular(file, file.stat().st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(file, flags), "rb") as stream:
        _require_regular(file, os.fstat(stream.fileno()).st_mode)
        yield stream


def _require_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularFileError(errno.EINVAL, "It is not a regular file", str(file))


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        IrregularFileError: a pipe, device, socket or folder.
        LargeFileError: more bytes.
        OSError: it is missing or cannot be read.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise LargeFileError(size, limit)
        data = stream.read(limit + 1)  # it may grow while it is read
    if len(data) > limit:
        raise LargeFileError(len(data), limit)
    return data


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a regular file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, for digests and cache keys.

    Raises:
        ValueError: the value holds a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError that explains a failed write to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"Could not write {path}: the disk is full.",
            "Nothing was left half-written, and what was there before is untouched.",
            f"free space (`df -h {path.parent}`) or choose another folder, then run the same command again",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"Could not write {path}: {os.strerror(error.errno)}.",
            "This user may not write there, or the file system is read-only.",
            f"choose a folder that you may write to, or change the rights of {path.parent}",
        )
    return StorageError(f"Could not write {path}.", str(error), "check the disk and run the same command again")


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a file name that are not UTF-8 are escaped, such as `\\udcfc`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def sync_directory(path: Path) -> None:
    """Make the renames in a folder durable."""
    # Some file systems refuse to sync a folder.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def short_name(name: str, room: int = 0) -> str:
    """A file name that is `room` bytes shorter than the longest possible name.

    A longer name is cut and gets eight letters of its hash, so that names with a common beginning stay different.
    """
    data = os.fsencode(name)
    if len(data) + room <= _LONGEST_NAME:
        return name
    mark = f"~{sha256_bytes(data)[:8]}"
    return data[: _LONGEST_NAME - room - len(mark)].decode("utf-8", "ignore") + mark


def temporary_name(target: Path, suffix: str = _TEMPORARY) -> Path:
    """A unique hidden name beside `target`."""
    return target.with_name(f".{short_name(target.name, MARKS)}.{uuid.uuid4().hex[:8]}.{suffix}")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use until the block or the process ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network shares have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove temporary files of killed writers from a folder, but not those in use."""
    if fcntl is None:
        return
    try:
        with os.scandir(folder) as entries:
            left = [Path(entry.path) for entry in entries if _LEFTOVER.fullmatch(entry.name)]
    except OSError:
        return
    for path in left:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                # There is a moment between creating a file and locking it.
                if time.time() - os.fstat(handle).st_ctime < _GRACE:
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(handle)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`.

    On any exception, also Ctrl-C, the temporary file is removed and `path` is unchanged. The first write of a process
    into a folder also removes temporary files of killed writers.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    target = Path(path)
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in _swept:
            _swept.add(target.parent)
            sweep(target.parent)
        temporary.touch()
        with held(temporary):
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write bytes atomically.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically. Raises StorageError like `write_bytes`.

    Bytes of a file name that are no UTF-8 are written as escapes (`teil_\\udce4.png`); JSON gives the name again.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def remove(folder: Path) -> None:
    """Remove a file, a link or a folder, as far as possible."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
