"""Files written whole or not at all, and their hashes."""

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

from .errors import ConfigError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "IrregularFileError",
    "LargeFileError",
    "alone",
    "atomic_directory",
    "atomic_file",
    "canonical_json",
    "may_write_folder",
    "open_regular",
    "put_back",
    "read_regular",
    "sha256_bytes",
    "sha256_file",
    "short_name",
    "storage_error",
    "turn",
    "write_bytes",
    "write_json",
    "write_text",
]

_CHUNK = 1 << 20
_LONGEST_NAME = 255  # bytes
_TEMPORARY = "saae-tmp"
_MARKS = len(f"..{'0' * 8}.{_TEMPORARY}")
_LEFTOVER = re.compile(rf"\..+\.[0-9a-f]{{8}}\.{_TEMPORARY}", re.DOTALL)
_GRACE = 10.0  # seconds
_TURN_PAUSE = 0.05  # seconds between two tries to get a lock
_swept: set[Path] = set()  # folders whose leftovers this process has removed: a folder of pictures is large
_SWAPS = 3  # tries, should a reader put the old folder back in the middle of one


class IrregularFileError(OSError):
    """What was to be read is a pipe, a device, a socket or a folder."""


class LargeFileError(OSError):
    """A file of more bytes than are read; `size` is how many it has."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} bytes, at most {limit} are read")
        self.size = size


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a regular file, or a link to one, for reading.

    A FIFO would wait for a writer for ever, and a device may have no end: they are refused before and, should the
    name be given to another file meanwhile, after opening.

    Raises:
        IrregularFileError: something else is there.
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
        raise IrregularFileError(errno.EINVAL, "It is no regular file", str(file))


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
    """JSON with sorted keys and no spaces: the form that digests and cache keys are made of.

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


def _sync_directory(path: Path) -> None:
    # A rename is durable only once its folder is; some file systems refuse to sync a folder.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def short_name(name: str, room: int = 0) -> str:
    """A file name that leaves `room` bytes of the longest name that file systems take.

    A longer one is cut and gets eight letters of its hash, so that two names that begin alike stay two names.
    """
    data = os.fsencode(name)
    if len(data) + room <= _LONGEST_NAME:
        return name
    mark = f"~{sha256_bytes(data)[:8]}"
    return data[: _LONGEST_NAME - room - len(mark)].decode("utf-8", "ignore") + mark


def _temporary(target: Path, suffix: str = _TEMPORARY) -> Path:
    return target.with_name(f".{short_name(target.name, _MARKS)}.{uuid.uuid4().hex[:8]}.{suffix}")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Marks a temporary file or folder as in use until the process leaves or ends, however it ends."""
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


def _sweep(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder; not what another one is writing."""
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
                # A writer has a moment between making its file and locking it.
                if time.time() - os.fstat(handle).st_ctime < _GRACE:
                    continue
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def _moved_aside(target: Path) -> list[Path]:
    """What a writer that was killed has left of the folders that it replaced, the latest last."""
    name = re.compile(rf"\.{re.escape(short_name(target.name, _MARKS))}\.[0-9a-f]{{8}}\.old")
    try:
        found = [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: entry.lstat().st_ctime_ns)
    except OSError:
        return []


def put_back(target: str | os.PathLike[str]) -> Path | None:
    """Undoes a replacement that was killed between its two renames: the folder that was there is there again.

    Args:
        target: a folder that `atomic_directory` writes.

    Returns:
        None where there is nothing to put back (or nothing any more); else where the old folder still lies, because
        it may not be renamed.
    """
    folder = Path(target)
    aside = _moved_aside(folder)
    if not aside or os.path.lexists(folder):
        return None
    try:
        aside[-1].rename(folder)
    except OSError:
        return None if os.path.lexists(folder) else aside[-1]
    return None


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it is synced and renamed to `path`.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was. The first file that a
    process writes into a folder removes what killed writers have left there.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in _swept:
            _swept.add(target.parent)
            _sweep(target.parent)
        temporary.touch()
        with _held(temporary):
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes bytes atomically.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically. Raises StorageError like `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def alone(lock: Path, what: str, cure: str) -> Iterator[None]:
    """Makes sure that no other process is in a block with the same lock.

    The system lets go of the lock when a process ends, however it ends. Where there are no locks (Windows, some network
    shares) nobody is kept out.

    Args:
        lock: an empty file, made where it is missing, and left.
        what: what is going on in the block, for the other one's error.
        cure: what that one can do.

    Raises:
        ConfigError: another process is in there.
        StorageError: the place may not be written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("wb")
    except OSError as error:
        raise storage_error(lock, error) from error
    with handle:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{what} is going on already.", f"It holds {lock}; both would write the same files.", cure
            ) from None
        except OSError:
            pass
        yield


@contextmanager
def turn(lock: Path | None, seconds: float) -> Iterator[bool]:
    """Waits until no other process or thread is in a block with the same lock; gives False where it waited in vain.

    The system lets go of the lock when a process ends, however it ends. Where there are no locks (Windows, some network
    shares, a place that may not be written to) nobody waits.

    Args:
        lock: an empty file, made where it is missing, and left; None: no lock.
        seconds: the longest wait.
    """
    handle = -1
    try:
        if lock is not None and fcntl is not None:
            with suppress(OSError):
                lock.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        yield handle < 0 or _locked(handle, seconds)
    finally:
        if handle >= 0:
            os.close(handle)


def _locked(handle: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_TURN_PAUSE)
        except OSError:
            return True


@contextmanager
def atomic_directory(target: str | os.PathLike[str], replace: bool = True, last: str = "") -> Iterator[Path]:
    """Gives a temporary folder beside `target`; on success it takes the place of `target`.

    An existing `target` is kept until the new folder is complete and synced, then swapped out and removed.
    On any exception, Ctrl-C included, the temporary folder is removed and `target` stays as it was. What an earlier
    call left that was killed in the middle of its swap is put back or removed first, and so are the temporary folders
    of writers that are gone.

    A `target` that cannot be renamed (a mount point, as a container's volume is, or one in a folder that this user may
    not write to) keeps its place: its contents are exchanged.

    Args:
        target: the folder to write.
        replace: whether an existing `target` may be replaced.
        last: where contents are exchanged, the file that goes first and comes last: without it nobody takes the folder
            for a whole one.

    Raises:
        StorageError: the disk is full, the place may not be written to, or `target` is a file, or exists and may not be
            replaced.
    """
    folder = Path(target)
    fixed = _is_fixed(folder)
    temporary = _temporary(folder / folder.name if fixed else folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        put_back(folder)
        if os.path.lexists(folder):
            for left in _moved_aside(folder):
                _remove(left)
        if folder.exists() and not replace:
            raise StorageError(f"{folder} is already there.", "It would be overwritten.", "choose another name")
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file.", "A folder is to be written there.", "choose another name")
        _sweep(temporary.parent)
        temporary.mkdir()
        with _held(temporary):
            yield temporary
            _sync_tree(temporary)
            if fixed or not _swap(temporary, folder):
                _exchange(temporary, folder, last)
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_directory(Path(root))


def may_write_folder(target: Path) -> None:
    """Makes sure, before long work, that `atomic_directory` may write a folder.

    Raises:
        StorageError: it may not.
    """
    place = target
    if not _is_fixed(target):
        place = target.parent
        while not place.exists() and place != place.parent:
            place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY) if hasattr(os, "statvfs") else False
        raise storage_error(target, OSError(errno.EROFS if read_only else errno.EACCES, ""))


def _is_fixed(folder: Path) -> bool:
    """Whether a folder is there and cannot be renamed."""
    try:
        return folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK | os.X_OK))
    except OSError:
        return False


def _exchange(new: Path, target: Path, last: str) -> None:
    """Exchanges the contents of `target` for those of `new`; an exception puts back what was there."""
    if new.parent != target:  # a mount within one file system: names do not move across it, not even there
        inside = _temporary(target / target.name)
        try:
            shutil.copytree(new, inside)
            _exchange(inside, target, last)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        return
    old = _temporary(target / target.name, "old")
    old.mkdir()
    arrived: list[Path] = []
    try:
        leaving = [entry for entry in target.iterdir() if entry not in (new, old)]
        for entry in sorted(leaving, key=lambda entry: entry.name != last):
            entry.rename(old / entry.name)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == last):
            arrived.append(entry.rename(target / entry.name))
        _sync_directory(target)
    except BaseException:
        for entry in arrived:
            _remove(entry)
        for entry in sorted(old.iterdir(), key=lambda entry: entry.name == last):
            entry.rename(target / entry.name)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, target: Path) -> bool:
    """Puts `new` in the place of `target`; False where `target` is in use as a mount point and cannot be renamed."""
    old = _temporary(target, "old")
    try:
        for last in (*[False] * (_SWAPS - 1), True):
            try:
                target.rename(old)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.EXDEV):
                    return False
                raise
            if _moved_in(new, target, last):
                break
        _sync_directory(target.parent)
        return True
    finally:
        # Stopped between the two renames (an error, Ctrl-C): what was there goes back.
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        else:
            _remove(old)


def _moved_in(new: Path, target: Path, last: bool) -> bool:
    """Renames `new`; False where a reader has found nothing at `target` and put the old one back meanwhile."""
    try:
        new.rename(target)
    except OSError as error:
        if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
