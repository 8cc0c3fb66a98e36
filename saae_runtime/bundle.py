"""The bundle on disk: a folder with a manifest. Opening checks every file; writing is all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import (
    BundleCorruptError,
    BundleError,
    BundleNotFoundError,
    BundlePathError,
    ConfigError,
    StorageError,
    shown,
)
from .files import sha256_file, write_json
from .folders import atomic_directory, may_write_folder, put_back
from .manifest import SCHEMA, Artefact, FileEntry, Manifest, rebuild_command
from .shell import shell_line

__all__ = ["MANIFEST", "Bundle", "is_bundle", "open_bundle", "refuse_foreign", "update_bundle", "write_bundle"]

MANIFEST = "manifest.json"

_MANIFEST_LIMIT = 64 << 20  # bytes: a manifest is some 100 kB; do not read a disk image into memory
_TRIES = 4  # attempts to open a bundle that another process replaces
_PAUSE = 0.05  # seconds between attempts: a replacement takes two renames
_REBUILD = "copy the bundle again, or rebuild it: saae-export build"

Fill = Callable[[Path], None] | Mapping[str, bytes | str | os.PathLike[str]]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: the folder, resolved.
        manifest: its manifest.
        stamp: identifies the manifest.json that was opened; empty for a bundle that was never on disk.
    """

    path: Path
    manifest: Manifest
    stamp: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def is_current(self) -> bool:
        """Whether the folder still holds this bundle: False once another process has replaced it."""
        return not self.stamp or self.stamp == _stamp(self.path)

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle.

        Raises:
            BundlePathError: the name leaves the folder, by `..`, an absolute path or a symbolic link.
        """
        return _inside(self.path, relative)

    def artefacts(
        self, *, kind: str | None = None, precision: str | None = None, library: str | None = None
    ) -> tuple[Artefact, ...]:
        """The artefacts of a kind, precision or library, in the order of the manifest."""
        return tuple(
            artefact
            for artefact in self.manifest.artefacts
            if kind in (None, artefact.kind)
            and precision in (None, artefact.precision)
            and library in (None, artefact.library)
        )

    def only(self, artefact: Artefact) -> Bundle:
        """This bundle with only one artefact, to open exactly that one."""
        return dataclasses.replace(self, manifest=dataclasses.replace(self.manifest, artefacts=(artefact,)))

    def sha256(self, relative: str) -> str:
        """The hash of a file in the manifest."""
        return self.manifest.files[relative].sha256


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a bundle: it has a manifest.json with a schema number. Checks nothing else."""
    try:
        data = _read_manifest(Path(path))
    except BundleError:
        return False
    return isinstance(data, Mapping) and "schema" in data and "artefacts" in data


def open_bundle(path: str | os.PathLike[str], verify: bool = True, mend: bool = False) -> Bundle:
    """Open a bundle and check it.

    The manifest is parsed strictly, every path is checked to stay inside, every size is compared, and with `verify`
    every hash too (sizes first: a truncated file is found without reading gigabytes). A bundle that a killed writer
    has moved aside is restored, and if the bundle is replaced meanwhile, the new one is opened.

    Args:
        path: the folder.
        verify: whether to compare hashes; sizes are always compared.
        mend: leave out engines that are missing, truncated or changed instead of raising; they can be compiled again.

    Raises:
        BundleNotFoundError: nothing found, a file instead of a folder, or a folder without a manifest.
        BundleCorruptError: a manifest that is not one, or a file that is missing, truncated or changed.
        BundleVersionError: written by a newer saae.
        BundlePathError: a path in the manifest that leaves the folder.
    """
    for last in (*[False] * (_TRIES - 1), True):
        stamp = _stamp(path)
        try:
            bundle = _open(path, verify, mend)
        except BundleError:
            if last or (stamp and stamp == _stamp(path)):
                raise
        else:
            if last or bundle.is_current():
                return bundle
        # The bundle was replaced meanwhile: part of what was read may be of the old one.
        time.sleep(_PAUSE)
    raise AssertionError("the last try returns or raises")


def _open(path: str | os.PathLike[str], verify: bool, mend: bool) -> Bundle:
    try:
        folder = Path(path)
        _require_folder(folder)
        root = folder.resolve()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # too long, a null byte, a loop of links, no rights
        raise BundleNotFoundError(
            f"No bundle at {shown(path, 200)}.", f"{type(error).__name__}: {error}", "check the path"
        ) from error
    stamp = _stamp(root)
    manifest = Manifest.from_json(_read_manifest(root), source=str(folder / MANIFEST))
    bundle = Bundle(root, manifest, stamp)
    _check_complete(manifest, folder)
    paths = {name: bundle.file(name) for name in manifest.files}
    engines = {item.file: item for item in manifest.artefacts if item.kind == "engine"}
    damaged: set[str] = set()
    for check in (_check_size, _check_hash) if verify else (_check_size,):
        for name, entry in manifest.files.items():
            try:
                if name not in damaged:
                    check(paths[name], name, entry, folder)
            except BundleCorruptError as error:
                if name not in engines:
                    raise
                if not mend:
                    error.cure = _compile_again(engines[name], folder)
                    raise
                damaged.add(name)
    return dataclasses.replace(bundle, manifest=_without(manifest, damaged)) if damaged else bundle


def write_bundle(target: str | os.PathLike[str], manifest: Manifest, fill: Fill) -> Bundle:
    """Write a bundle: the complete folder appears at once, or the earlier one stays.

    Args:
        target: the folder to write; a bundle that is already there is replaced.
        manifest: everything except `files`, which is computed here, and `schema`, which is this version's.
        fill: writes the bundle's files into the folder given to it; or a mapping from relative path to content
            (bytes) or to a file to copy.

    Returns:
        The written bundle, opened.

    Raises:
        ConfigError: `target` is a folder with something other than a bundle; it is not overwritten.
        BundleCorruptError: an artefact of the manifest was not written.
        BundlePathError: a path that leaves the folder, or a symbolic link among the files.
        StorageError: the disk is full, or the place may not be written to.
    """
    folder = Path(target)
    refuse_foreign(folder)
    with atomic_directory(folder, last=MANIFEST) as temporary:
        _fill(temporary, fill)
        complete = dataclasses.replace(manifest, files=_entries(temporary), schema=SCHEMA)
        _check_complete(complete, folder)
        write_json(temporary / MANIFEST, complete.to_json())
    return Bundle(folder.resolve(), complete, _stamp(folder))


def update_bundle(
    bundle: Bundle,
    manifest: Manifest,
    fill: Fill,
    drop: tuple[str, ...] = (),
    target: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Write a bundle again with files added or replaced, such as an engine built later.

    Existing files are linked (or copied if links are not possible), so this is cheap for large ones.

    Args:
        bundle: the bundle as it is.
        manifest: the new manifest; its `files` is computed.
        fill: writes the new files, see `write_bundle`.
        drop: files of the bundle to leave out.
        target: another folder to write to; the bundle itself is not changed.

    Raises:
        As `write_bundle`.
        StorageError: another command has written the bundle since it was opened, and its work would be undone.
    """
    if target is None and not bundle.is_current():
        raise StorageError(
            f"{bundle.path} was changed by another command meanwhile.",
            "What this one would write belongs to the bundle as it was, with its thresholds and engines.",
            "nothing was written; run it again",
        )

    def fill_all(folder: Path) -> None:
        # New files first: writing into a linked one would change the old bundle too.
        _fill(folder, fill)
        for name in bundle.manifest.files:
            if name not in drop and not (folder / name).exists():
                _link(bundle.file(name), folder / name)

    return write_bundle(bundle.path if target is None else target, manifest, fill_all)


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        aside = put_back(folder)
        if aside is not None:
            raise BundleNotFoundError(
                f"No bundle at {folder}.",
                f"A replacement was interrupted; the earlier bundle is in {aside}, and this user may not rename it.",
                shell_line("mv", aside, folder),
            )
    if not folder.exists():
        near = _bundles_near(folder)
        raise BundleNotFoundError(
            f"No bundle at {folder}.",
            "There is nothing at that path.",
            f"use one of: {', '.join(near)}" if near else "check the path, or build one: saae-export build",
        )
    if not folder.is_dir():
        raise BundleNotFoundError(
            f"{folder} is not a bundle.", "It is a file; a bundle is a folder.", f"give its folder: {folder.parent}"
        )
    if not (folder / MANIFEST).exists():
        inside = sorted(str(item) for item in folder.iterdir() if (item / MANIFEST).is_file())[:5]
        raise BundleNotFoundError(
            f"{folder} is not a bundle.",
            f"The folder has no {MANIFEST}.",
            f"use one of: {', '.join(inside)}" if inside else "give the folder that `saae-export build` wrote",
        )


def _bundles_near(folder: Path) -> list[str]:
    try:
        return sorted(str(item) for item in folder.parent.iterdir() if (item / MANIFEST).is_file())[:5]
    except OSError:
        return []


def _read_manifest(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise BundleCorruptError(f"{path} is a link out of the bundle.", "", _REBUILD)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe could wait for ever
            raise BundleCorruptError(f"{path} is not a manifest.", "It is not a regular file.", _REBUILD)
        if found.st_size > _MANIFEST_LIMIT:
            raise BundleCorruptError(f"{path} is not a manifest.", f"It has {found.st_size} bytes.", _REBUILD)
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundleCorruptError(f"{path} cannot be read.", str(error), _REBUILD) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"It is not JSON ({error}); the file may be cut off."
        raise BundleCorruptError(f"{path} cannot be read.", why, _REBUILD) from error


def _stamp(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Identifies the manifest.json of a folder, which is never written in place. Empty without one."""
    try:
        found = (Path(folder) / MANIFEST).stat()
    except (OSError, ValueError, TypeError):
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    return dataclasses.replace(
        manifest,
        artefacts=tuple(item for item in manifest.artefacts if item.file not in names),
        files={name: entry for name, entry in manifest.files.items() if name not in names},
    )


def _compile_again(engine: Artefact, folder: Path) -> str:
    command = rebuild_command(str(engine.library), engine.sm, engine.precision, str(folder))
    return f"copy the bundle again, or compile the engine again: {command}"


def _check_complete(manifest: Manifest, folder: Path) -> None:
    for artefact in manifest.artefacts:
        if artefact.file not in manifest.files:
            raise BundleCorruptError(
                f"{folder}: the manifest names {artefact.file}, which is not among the bundle's files.", "", _REBUILD
            )
        if artefact.precision not in manifest.thresholds:
            raise BundleCorruptError(
                f"{folder}: {artefact.file} has no thresholds at its precision, {artefact.precision}.", "", _REBUILD
            )


def _inside(root: Path, relative: str) -> Path:
    """`root / relative`, after a check that it stays inside `root` (resolved)."""
    parts = PurePosixPath(relative).parts
    plain = bool(parts) and not relative.startswith("/") and ".." not in parts
    if not plain or any(bad in relative for bad in ("\\", "\0", ":")):
        raise BundlePathError(
            f"The manifest names {shown(relative)}, which is not a path inside the bundle.",
            "Paths are relative, with forward slashes and without `..`.",
            "do not use this bundle unless you know where it comes from; rebuild it: saae-export build",
        )
    path = root.joinpath(*parts)
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundlePathError(f"{root}: {shown(relative)} is not the path of a file.", str(error), _REBUILD) from error
    if not real.is_relative_to(root):
        raise BundlePathError(
            f"{relative} leads out of the bundle {root}.",
            f"It is a symbolic link to {real}.",
            "do not use this bundle unless you know where it comes from; replace the link by the file itself",
        )
    return path


def _check_size(path: Path, name: str, entry: FileEntry, folder: Path) -> None:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        why = f"The manifest lists it. {error}"
        raise BundleCorruptError(f"{folder}: {shown(name)[1:-1]} is missing.", why, _REBUILD) from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleCorruptError(f"{folder}: {name} is missing.", "It is not a regular file.", _REBUILD)
    size = found.st_size
    if size != entry.size:
        state = "truncated" if size < entry.size else "changed"
        raise BundleCorruptError(
            f"{folder}: {name} is {state}.", f"It has {size} bytes; the manifest says {entry.size}.", _REBUILD
        )


def _check_hash(path: Path, name: str, entry: FileEntry, folder: Path) -> None:
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BundleCorruptError(f"{folder}: {name} cannot be read.", str(error), _REBUILD) from error
    if found != entry.sha256:
        raise BundleCorruptError(
            f"{folder}: {name} was changed after the bundle was written.",
            f"sha256 is {found[:12]}..., the manifest says {entry.sha256[:12]}...",
            _REBUILD,
        )


def refuse_foreign(target: Path) -> None:
    """Check that a bundle may be written to `target`: it is missing, an empty folder, or a bundle.

    Raises:
        ConfigError: it is something else.
        StorageError: the place may not be written to.
    """
    may_write_folder(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())) or is_bundle(target):
        return
    raise ConfigError(
        f"{target} is not a bundle, so it is not replaced by one.",
        "Writing a bundle replaces the whole folder.",
        "choose another folder, or remove this one yourself",
    )


def _fill(folder: Path, fill: Fill) -> None:
    if callable(fill):
        fill(folder)
        return
    for name, content in fill.items():
        path = _inside(folder.resolve(), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _entries(folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for root, directories, names in os.walk(folder):
        for name in (*directories, *names):
            if (Path(root) / name).is_symlink():
                raise BundlePathError(
                    f"{name} is a symbolic link.", "A bundle holds plain files only.", "copy the file itself"
                )
        for name in names:
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            if relative == MANIFEST:
                raise ConfigError(f"{MANIFEST} is written by write_bundle.", "", "give the manifest as an argument")
            entries[relative] = FileEntry(sha256_file(path), path.stat().st_size)
    return dict(sorted(entries.items()))
