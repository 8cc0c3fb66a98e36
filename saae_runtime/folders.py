"""Atomic writes of folders: written beside the target, then swapped in."""

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

_SWAPS = 3  # attempts, in case a reader restores the old folder meanwhile


def _moved_aside(target: Path) -> list[Path]:
    """Old folders that killed writers have left, the latest last."""
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
        None if nothing is left to restore; else the path of the old folder, which may not be renamed.
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
    """Yield a temporary folder beside `target`; on success it replaces `target`.

    An existing `target` is kept until the new folder is complete and synced, then swapped out and removed.
    On any exception, also Ctrl-C, the temporary folder is removed and `target` is unchanged. Leftovers of killed calls
    are restored or removed first.

    If `target` cannot be renamed (a mount point, such as a container's volume, or in a folder that this user may not
    write to), its contents are exchanged instead.

    Args:
        target: the folder to write.
        replace: whether an existing `target` may be replaced.
        last: if contents are exchanged, the file that is removed first and added last, without which the folder counts
            as incomplete.

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
    """Check before long work that `atomic_directory` can write a folder.

    Raises:
        StorageError: it cannot.
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
    """Whether a folder exists and cannot be renamed."""
    try:
        return folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK | os.X_OK))
    except OSError:
        return False


def _exchange(new: Path, target: Path, last: str) -> None:
    """Exchange the contents of `target` for those of `new`; an exception restores the old ones."""
    if new.parent != target:  # renames fail across a mount, even within one file system
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
    """Replace `target` by `new`; False if `target` is a mount point and cannot be renamed."""
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
        # Stopped between the two renames (an error, Ctrl-C): restore the old folder.
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        else:
            remove(old)


def _moved_in(new: Path, target: Path, last: bool) -> bool:
    """Rename `new`; False if a reader has found no `target` and restored the old one meanwhile."""
    try:
        new.rename(target)
    except OSError as error:
        if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
