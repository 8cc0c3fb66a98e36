"""Lists the files of a folder or a pattern: follows links to folders, and reads no folder twice."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from ..images import IMAGE_SUFFIXES

__all__ = ["FolderOnce", "expand", "filing_stem", "folders_below", "images_below", "is_picture_name", "pattern_takes"]

OnError = Callable[[OSError], None]


class FolderOnce:
    """Identifies folders by inode, because a link may lead to one that was read already.

    Folders above the root count as read, because a link back to them would include everything beside the images.

    Args:
        root: the folder to start from.
    """

    def __init__(self, root: Path) -> None:
        self._seen: set[tuple[int, int]] = set()
        for parent in root.resolve().parents:
            self.enter(parent)

    def enter(self, folder: str | os.PathLike[str]) -> bool:
        """Whether this folder is new; marks it as read."""
        try:
            facts = Path(folder).stat()
        except OSError:  # listing it raises the error
            return True
        key = (facts.st_dev, facts.st_ino)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def folders_below(root: Path, onerror: OnError | None = None) -> Iterator[Path]:
    """`root` and the folders below it, each real one once, sorted by name, without hidden ones.

    Folders come before links, so that a folder that is also linked keeps its own name.

    Args:
        root: where.
        onerror: called for a folder that cannot be listed, or a link that cannot be followed; without it, they count
            as empty.
    """
    once = FolderOnce(root)
    waiting = [root]
    links: list[Path] = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if not once.enter(folder):
            continue
        yield folder
        inside: list[Path] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and _is_folder(entry, onerror):
                        (links if entry.is_symlink() else inside).append(folder / entry.name)
        except OSError as error:
            if onerror is not None:
                onerror(error)
        links.sort()
        waiting.extend(sorted(inside, reverse=True))


def _is_folder(entry: os.DirEntry[str], onerror: OnError | None) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # of a link; what stands beside it counts
        if onerror is not None and error.errno != errno.ELOOP:  # one that leads nowhere
            onerror(error)
        return False


def is_picture_name(name: str) -> bool:
    """Whether a file of this name counts as an image when a folder is listed; hidden ones do not."""
    return not name.startswith(".") and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def images_below(folder: Path, recursive: bool = False, onerror: OnError | None = None) -> list[Path]:
    """The image files of a folder, sorted by name, without hidden ones.

    Args:
        folder: where.
        recursive: whether folders below it are read too; see `folders_below`.
        onerror: called for a folder that cannot be listed, which else counts as empty.
    """
    found: list[Path] = []
    for root in folders_below(folder, onerror) if recursive else [folder]:
        try:
            with os.scandir(root) as entries:
                names = sorted(entry.name for entry in entries if is_picture_name(entry.name) and not entry.is_dir())
        except OSError as error:
            if onerror is not None:
                onerror(error)
            continue
        found.extend(root / name for name in names)
    return found


def fixed_part(pattern: str) -> tuple[Path, tuple[str, ...]]:
    """The folder in front of a pattern's first wildcard, and the parts from there on."""
    parts = Path(pattern).parts
    count = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:count]), parts[count:]


def expand(pattern: str) -> list[Path]:
    """Matches of a glob pattern, sorted by name. `**` crosses folders like `folders_below`."""
    root, parts = fixed_part(pattern)
    return sorted(set(_expand(root, parts)), key=str)


def _expand(base: Path, parts: Sequence[str]) -> Iterator[Path]:
    if not parts:
        if os.path.lexists(base):
            yield base
        return
    head, rest = parts[0], parts[1:]
    if head == "**":
        for folder in folders_below(base) if base.is_dir() else ():
            yield from _expand(folder, rest or ("*",))
    elif glob.has_magic(head):
        try:
            with os.scandir(base) as entries:
                names = [entry.name for entry in entries if _fits(entry.name, head)]
        except OSError:
            return
        for name in names:
            if not rest or (base / name).is_dir():
                yield from _expand(base / name, rest)
    else:
        yield from _expand(base / head, rest)


def _fits(name: str, part: str) -> bool:
    return (part.startswith(".") or not name.startswith(".")) and fnmatch.fnmatchcase(name, part)


def pattern_takes(pattern: str, path: Path) -> bool:
    """Whether a pattern would match a file that may not exist yet.

    Args:
        pattern: a glob pattern.
        path: the file.
    """
    root, parts = fixed_part(pattern)
    try:
        inside = path.resolve().relative_to(root.resolve())
    except ValueError:
        return ".." in parts
    return _takes(tuple(part for part in parts if part != ".."), inside.parts)


def _takes(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return bool(parts) and (_takes(pattern[1:] or ("*",), parts) or _takes(pattern, parts[1:]))
    return bool(parts) and _fits(parts[0], pattern[0]) and _takes(pattern[1:], parts[1:])


def filing_stem(relative: PurePath) -> PurePath:
    """A path without its ending, for pictures; a name of only dots and an ending is kept."""
    return relative.with_name(relative.stem if relative.stem.strip(".") else relative.name)
