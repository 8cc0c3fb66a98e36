"""Lists a folder, and the folders below it, again and again: which images were added, and which removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .folders import folders_below, is_picture_name

__all__ = ["Listing"]

_SWEEP = 2.0  # seconds after which a folder is listed again regardless of notices
_GRAIN = 2.0  # seconds; resolution of times on some file systems
_TICK = 0.05  # seconds; more than a tick of this system's clock


@dataclass
class _Listed:
    """The last listing of a folder.

    changed: the folder's time of change. since: when that time was first seen. at: when the folder was listed. again:
    whether it is listed at the next check in any case. names: its images.
    """

    changed: int = -1
    since: float = -1e9
    at: float = -1e9
    again: bool = True
    names: set[str] = field(default_factory=set)


class Listing:
    """The images in a folder, by name.

    A folder is listed when its time of change is another one, and once more a while later: see `_names`. A folder below
    that this user may not list, such as `lost+found`, stays as it was when it was last listed: empty, if it never was.

    Args:
        path: the folder.
        recursive: whether folders below it count too.
        say: called once with a line about each folder below that may not be listed.
    """

    def __init__(self, path: Path, recursive: bool, say: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._recursive, self._say = path, recursive, say
        self._below: dict[str, _Listed] = {}
        self._denied: set[str] = set()
        self._below_at = -1e9

    def list_again(self) -> None:
        """List every folder at the next call, whatever its time says."""
        self._below_at = -1e9
        for listed in self._below.values():
            listed.again = True

    def changes(self, hints: set[str], now: float) -> tuple[set[str], set[str]]:
        """Paths of images that were added and removed since the last call.

        Args:
            hints: paths that the system has named.
            now: monotonic time in seconds.

        Raises:
            OSError: the root cannot be listed, or a folder below it that is still there, for another reason than its
                permissions.
        """
        changed = self._path.stat().st_mtime_ns
        if not self._recursive:
            self._below.setdefault(str(self._path), _Listed())
        elif self._below_at + _SWEEP <= now or self._below.get(str(self._path), _Listed()).changed != changed:
            self._find_below()
            self._below_at = now
        found: list[tuple[str, _Listed, set[str]]] = []
        removed: list[str] = []
        for folder, listed in self._below.items():
            try:
                names = self._names(folder, listed, hints, now)
            except OSError as error:
                if isinstance(error, PermissionError) and folder != str(self._path):
                    listed.again = True  # new permissions do not change its time
                    continue
                if not isinstance(error, FileNotFoundError) or folder == str(self._path):
                    self.list_again()  # what the others hold by now is not noted yet
                    raise
                names = set()
                removed.append(folder)
            if names is not None:
                found.append((folder, listed, names))
        new: set[str] = set()
        gone: set[str] = set()
        for folder, listed, names in found:
            new.update(os.path.join(folder, name) for name in names - listed.names)  # noqa: PTH118
            gone.update(os.path.join(folder, name) for name in listed.names - names)  # noqa: PTH118
            listed.names = names
        for folder in removed:
            del self._below[folder]
        return new, gone

    def _find_below(self) -> None:
        denied: set[str] = set()

        def fail(error: OSError) -> None:
            if isinstance(error, PermissionError) and str(error.filename) != str(self._path):
                denied.add(str(error.filename))
            elif not isinstance(error, FileNotFoundError):
                raise error

        found = {str(folder) for folder in folders_below(self._path, fail)}
        for name in sorted(denied - self._denied):
            self._say(f"{name} may not be listed (permission denied): its images are left out")
        self._denied = denied
        for folder in found - set(self._below):
            self._below[folder] = _Listed()

    def _names(self, folder: str, listed: _Listed, hints: set[str], now: float) -> set[str] | None:
        """The image names in a folder; None if they have not changed by its time of change.

        A change right behind a listing may leave that time as it is, for as long as the file system does not count on.
        So a folder is listed once more when its time has been the same for that long. That is measured here: the
        clock of a server may be wrong.
        """
        changed = os.stat(folder).st_mtime_ns  # noqa: PTH116 (Path is slow, and this runs for every folder at every look)
        if changed != listed.changed:
            listed.changed, listed.since, listed.again = changed, now, True
        due = now - listed.at >= _SWEEP
        if not listed.again and not (due and listed.at - listed.since < _GRAIN):
            return None
        here = {name for path in hints for head, name in (os.path.split(path),) if head == folder}
        if here and not due:
            # New files are known by notices; a listing of 100,000 names can wait for the next sweep.
            return listed.names | {name for name in here if os.path.lexists(os.path.join(folder, name))}  # noqa: PTH118
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if is_picture_name(entry.name)}
        listed.at, listed.again = now, abs(time.time() - changed / 1e9) < _TICK  # within a tick of this system
        return names
