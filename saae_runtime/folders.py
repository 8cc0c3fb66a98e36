"""Folders written whole or not at all: written beside the target, then swapped in."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError
from .files import MARKS, held, remove, short_name, storage_error, sweep, sync_directory, temporary_name

__all__ = ["atomic_directory", "may_write_folder", "put_back"]

_SWAPS = 3  # tries, should a reader put the old folder back in the middle of one


def _moved_aside(target: Path) -> list[Path]:
    """What a writer that was killed has left of the folders that it replaced, the latest last."""
    name = re.compile(rf"\.{re.escape(short_name(target.name, MARKS))}\.[0-9a-f]{{8}}\.old")
    try:
        found = [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: entry.lstat().st_ctime_ns)
    except OSError:
        return []


def put_back(target: str | os.PathLike[str]) -> Path | None:
    """Undo a replacement that was killed between its two renames: restore the earlier folder.

    Args:
        target: a folder that `atomic_directory` writes.

    Returns:
        None if there is nothing (more) to put back; else the path of the old folder, which may not be renamed.
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
def atomic_directory(target: str | os.PathLike[str], replace: bool = True, last: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it takes the place of `target`.

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
    temporary = temporary_name(folder / folder.name if fixed else folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        put_back(folder)
        if os.path.lexists(folder):
            for left in _moved_aside(folder):
                remove(left)
        if folder.exists() and not replace:
            raise StorageError(f"{folder} is already there.", "It would be overwritten.", "choose another name")
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file.", "A folder must be written there.", "choose another name")
        sweep(temporary.parent)
        temporary.mkdir()
        with held(temporary):
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
        sync_directory(Path(root))


def may_write_folder(target: Path) -> None:
    """Make sure, before long work, that `atomic_directory` may write a folder.

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
    """Exchange the contents of `target` for those of `new`; an exception puts back what was there."""
    if new.parent != target:  # a mount within one file system: names do not move across it, not even there
        inside = temporary_name(target / target.name)
        try:
            shutil.copytree(new, inside)
            _exchange(inside, target, last)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        return
    old = temporary_name(target / target.name, "old")
    old.mkdir()
    arrived: list[Path] = []
    try:
        leaving = [entry for entry in target.iterdir() if entry not in (new, old)]
        for entry in sorted(leaving, key=lambda entry: entry.name != last):
            entry.rename(old / entry.name)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == last):
            arrived.append(entry.rename(target / entry.name))
        sync_directory(target)
    except BaseException:
        for entry in arrived:
            remove(entry)
        for entry in sorted(old.iterdir(), key=lambda entry: entry.name == last):
            entry.rename(target / entry.name)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _swap(new: Path, target: Path) -> bool:
    """Put `new` in the place of `target`; False where `target` is in use as a mount point and cannot be renamed."""
    old = temporary_name(target, "old")
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
        sync_directory(target.parent)
        return True
    finally:
        # Stopped between the two renames (an error, Ctrl-C): what was there goes back.
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        else:
            remove(old)


def _moved_in(new: Path, target: Path, last: bool) -> bool:
    """Rename `new`; False where a reader has found nothing at `target` and put the old one back meanwhile."""
    try:
        new.rename(target)
    except OSError as error:
        if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
