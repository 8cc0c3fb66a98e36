"""Gets MVTec AD from its publisher: licence, resumed download, hash, safe unpacking, and counts of what arrived."""

from __future__ import annotations

import difflib
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from saae_runtime.errors import ConfigError, DataError, FetchError, StorageError
from saae_runtime.files import sha256_file
from saae_runtime.folders import atomic_directory
from saae_runtime.images import IMAGE_SUFFIXES
from saae_runtime.shell import shell_line

from .category import GOOD, Category, find_category
from .download import Progress, download

__all__ = ["LICENCE", "MVTEC_AD", "Archive", "Counts", "Source", "fetch_mvtec", "unpack"]

LICENCE = """\
MVTec AD (c) MVTec Software GmbH, published under
Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International (CC BY-NC-SA 4.0),
https://creativecommons.org/licenses/by-nc-sa/4.0/
  - You may not use the images for commercial purposes.
  - You must name the source: P. Bergmann, M. Fauser, D. Sattlegger, C. Steger,
    "MVTec AD - A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", CVPR 2019.
  - What you derive from the images may be passed on under the same licence only."""
"""The licence of MVTec AD in short, shown before every download."""

_MARGIN = 1.1
"""Disk space needed for the unpacked images, as a multiple of the archive's size."""

_MOST_FILES = 50_000
_UNPACKED_AT_MOST = 8
"""An archive that grows by more than this factor is not an image archive but a bomb."""


@dataclass(frozen=True)
class Archive:
    """One file offered by the publisher; size in bytes and sha256 where they are known."""

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Counts:
    """How many images a complete category has."""

    train: int
    test_good: int
    test_bad: int


@dataclass(frozen=True)
class Source:
    """A published collection of categories: its archives, and how many images a complete category has."""

    title: str
    page: str
    licence: str
    whole: Archive
    archives: Mapping[str, Archive]
    counts: Mapping[str, Counts]


# Image counts: the overview table of the MVTec AD paper. The publisher keeps the files on a share whose links change
# now and then; the page that links to the current ones is `page`. The sha256 is known for the whole collection only:
# an archive of one category is checked by xz's own checksums and by its image counts.
_SHARE = "https://www.mydrive.ch/shares"
_CATEGORIES: dict[str, tuple[str, Counts]] = {
    "bottle": ("150452/132a93367fb17cdf968dfb5c4013f6e7/download/420937370-1629958698", Counts(209, 20, 63)),
    "cable": ("150453/10f960e07fec2838b2cd512586633a32/download/420937413-1629958794", Counts(224, 58, 92)),
    "capsule": ("150454/e0ce6dd74eb150f46c0d98131b3703f2/download/420937454-1629958872", Counts(219, 23, 109)),
    "carpet": ("150455/eac7fbce84d93a5094e13f391170eca4/download/420937484-1629959013", Counts(280, 28, 89)),
    "grid": ("150456/bb0b2e3dc804ccb8b4485e01f8e4493b/download/420937487-1629959044", Counts(264, 21, 57)),
    "hazelnut": ("150457/51d49f65e84bdc100ff8035d7dd783ea/download/420937545-1629959162", Counts(391, 40, 70)),
    "leather": ("150458/923030ce14e10a7d147e95d0f8885f6b/download/420937607-1629959262", Counts(245, 32, 92)),
    "metal_nut": ("150459/c68856a21dca589b0f8ff6d4ee0f18f4/download/420937637-1629959294", Counts(220, 22, 93)),
    "pill": ("150460/d4f1c04da67034ccc8d8b5fa3e73f244/download/420938129-1629960351", Counts(267, 26, 141)),
    "screw": ("150461/242f454cc6385e5693c4fd4b94567d1e/download/420938130-1629960389", Counts(320, 41, 119)),
    "tile": ("150462/5479f0fdc97bc6fa16eab0cb0cf0109f/download/420938133-1629960456", Counts(230, 33, 84)),
    "toothbrush": ("150463/895a1a5fb84b958f07417784b060434b/download/420938134-1629960477", Counts(60, 12, 30)),
    "transistor": ("150464/99b8ea0332438d64fcc2475ee73f9c29/download/420938166-1629960554", Counts(213, 60, 40)),
    "wood": ("150465/d5b4115b720cdb54d217e75636e6e374/download/420938383-1629960649", Counts(247, 19, 60)),
    "zipper": ("150466/bd155b557520edaf692d9bfdb915c24a/download/420938385-1629960680", Counts(240, 32, 119)),
}

MVTEC_AD = Source(
    title="MVTec AD",
    page="https://www.mvtec.com/company/research/datasets/mvtec-ad/downloads",
    licence=LICENCE,
    whole=Archive(
        "mvtec_anomaly_detection.tar.xz",
        f"{_SHARE}/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        5_264_982_680,
        "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    ),
    archives={n: Archive(f"{n}.tar.xz", f"{_SHARE}/{place}/{n}.tar.xz") for n, (place, _) in _CATEGORIES.items()},
    counts={name: counts for name, (_, counts) in _CATEGORIES.items()},
)
"""MVTec AD as its publisher offers it."""


def fetch_mvtec(
    category: str,
    dest: str | os.PathLike[str],
    accept_license: bool = False,
    *,
    archive: str | os.PathLike[str] | None = None,
    url: str | None = None,
    sha256: str | None = None,
    keep_archive: bool = False,
    progress: Progress | None = None,
    source: Source = MVTEC_AD,
) -> tuple[Category, ...]:
    """Put a category of MVTec AD (or "all" of them) into `dest`.

    A category that is there and complete is left alone, so the call may be repeated. An interrupted
    download resumes where it stopped. Each category's folder appears only when it is complete.

    Args:
        category: name of a category, or "all".
        dest: folder that holds the categories.
        accept_license: that the caller has read and accepts the licence (`source.licence`).
        archive: take this file, downloaded by hand (a category's archive or the whole collection), instead.
        url: take the archive from here instead, for when the publisher's link has changed.
        sha256: what the archive must hash to; by default the known hash, where there is one.
        keep_archive: keep the downloaded archive beside the images.
        progress: called with ("download" | "check" | "unpack", done, total) in bytes.
        source: the collection; MVTec AD.

    Returns:
        The categories, ready to use.

    Raises:
        ConfigError: no such category.
        FetchError: licence not accepted, no network, a wrong hash, an unsafe or incomplete archive.
        DataError: the category's folder holds something else.
        StorageError: not enough room, or `dest` may not be written to.
    """
    dest = Path(dest)
    wanted = _wanted(category, source)
    missing = [name for name in wanted if not _complete(dest / name, source.counts[name])]
    if missing:
        for name in missing:
            if (dest / name).exists():
                raise DataError(
                    f"{dest / name} is already there, but it is not the complete {source.title} category.",
                    f"Found {_count(dest / name)}, expected {source.counts[name]}.",
                    f"move {dest / name} away, or choose another folder with --into",
                )
        if not accept_license:
            raise FetchError(
                f"The licence of {source.title} has not been accepted.",
                "\n       ".join(source.licence.splitlines()),
                "read it, then run: " + shell_line("saae-train", "fetch", category, "--into", dest, "--accept-license"),
            )
        offered = source.whole if category == "all" else source.archives[category]
        if archive is None:
            file = _get(offered, dest, url, sha256, category, progress, source)
        else:
            file = _given(Path(archive), offered, sha256, progress, source)
        _room(dest, int(file.stat().st_size * _MARGIN))
        _unpack_into(file, dest, missing, source, progress)
        if archive is None and not keep_archive:
            file.unlink(missing_ok=True)
            _drop_if_empty(file.parent)
    return tuple(find_category(dest, name) for name in wanted)


def unpack(
    file: Path, targets: Mapping[str, Path], progress: Progress | None = None, most_bytes: int | None = None
) -> None:
    """Unpack the folders named in `targets` from a tar archive that is not trusted.

    Only plain files and folders are written, with default rights. Absolute names, "..", links, devices, names that
    occur twice and archives that unpack to far more than their size refuse the whole archive, also where the bad
    entry lies outside the wanted folders. A folder may lie at the top of the archive or one level below it.

    Args:
        file: the archive, compressed or not.
        targets: folder name in the archive -> existing empty folder to write to.
        progress: called with ("unpack", bytes of the archive read, its size).
        most_bytes: limit of the unpacked bytes; by default eight times the archive's size, at least 64 MiB.

    Raises:
        FetchError: unsafe, damaged or not an archive.
        OSError: writing failed.
    """
    size = file.stat().st_size
    budget = most_bytes if most_bytes is not None else max(_UNPACKED_AT_MOST * size, 64 << 20)
    seen: set[PurePosixPath] = set()
    try:
        with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            for count, member in enumerate(tar):
                name = _safe_name(file, member)
                budget -= member.size + tarfile.BLOCKSIZE  # a folder is nothing but its header
                if budget < 0 or count >= _MOST_FILES:
                    raise _unsafe(file, member.name, "it unpacks to far more than a set of images")
                if member.isdir():
                    continue
                if name in seen:
                    raise _unsafe(file, member.name, "the name occurs twice")
                seen.add(name)
                target = _place(name, targets)
                if target is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                if stream is None:
                    raise _unsafe(file, member.name, "it is not a regular file")
                with stream, target.open("xb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
                if progress is not None:
                    progress("unpack", min(raw.tell(), size), size)
            # tarfile stops at its end mark; the compressor's own checksum comes after it.
            while tar.fileobj is not None and (rest := tar.fileobj.read(1 << 20)):
                budget -= len(rest)
                if budget < 0:
                    raise _unsafe(file, "(after the last entry)", "it unpacks to far more than a set of images")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise FetchError(
            f"{file} cannot be unpacked.",
            f"It is damaged, incomplete or not an archive ({type(error).__name__}: {error}).",
            f"delete {file} and fetch it again",
        ) from error


def _safe_name(file: Path, member: tarfile.TarInfo) -> PurePosixPath:
    """The member's path, FetchError unless it is a plain file or folder that stays inside."""
    if not (member.isreg() or member.isdir()):
        kind = "a link" if member.issym() or member.islnk() else "a device or another special file"
        raise _unsafe(file, member.name, f"it is {kind}")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise _unsafe(file, member.name, "it points outside the folder")
    if "\\" in member.name or "\0" in member.name or ":" in member.name:
        raise _unsafe(file, member.name, "its name means another path on other systems")
    data_filter = getattr(tarfile, "data_filter", None)  # Python 3.12, and late releases of 3.10 and 3.11
    if data_filter is not None:
        data_filter(member, str(file.parent.resolve()))
    return name


def _place(name: PurePosixPath, targets: Mapping[str, Path]) -> Path | None:
    """Target path of a file of the archive; None if it is in no wanted folder."""
    for depth in (0, 1):
        if len(name.parts) > depth + 1 and name.parts[depth] in targets:
            return targets[name.parts[depth]].joinpath(*name.parts[depth + 1 :])
    return None


def _unsafe(file: Path, name: str, why: str) -> FetchError:
    return FetchError(
        f"{file} holds an entry that is not safe to unpack: {name!r}.",
        f"Reason: {why}. Nothing of the archive was kept.",
        "take the archive from its publisher; do not use this one",
    )


def _unpack_into(file: Path, dest: Path, names: Sequence[str], source: Source, progress: Progress | None) -> None:
    with ExitStack() as stack:
        targets = {name: stack.enter_context(atomic_directory(dest / name, replace=False)) for name in names}
        unpack(file, targets, progress)
        for name, folder in targets.items():
            if not _complete(folder, source.counts[name]):
                raise FetchError(
                    f"{file} does not hold the complete category {name!r}.",
                    f"Found {_count(folder)}, expected {source.counts[name]}. Nothing of it was kept.",
                    f"delete it and fetch again, or download {source.archives[name].name} from {source.page}",
                )


def _get(
    offered: Archive,
    dest: Path,
    url: str | None,
    sha256: str | None,
    category: str,
    progress: Progress | None,
    source: Source,
) -> Path:
    file = dest / ".downloads" / offered.name
    by_hand = (
        f"check the network (HTTPS_PROXY is honoured) and run the same command again, or download {offered.name} "
        f"from {source.page} and run: "
        + shell_line("saae-train", "fetch", category, "--into", dest, "--accept-license", "--archive", offered.name)
    )
    expected = sha256 or offered.sha256
    if not file.is_file():
        if offered.size is not None:
            part = file.with_name(file.name + ".part")
            there = part.stat().st_size if part.exists() else 0
            _room(dest, int(offered.size * (1 + _MARGIN)) - there)
        try:
            download(url or offered.url, file, cure=by_hand, progress=progress, room=lambda n: _room(dest, n))
        finally:
            _drop_if_empty(file.parent)
    _check_hash(file, expected, progress, remove=True)
    return file


def _given(file: Path, offered: Archive, sha256: str | None, progress: Progress | None, source: Source) -> Path:
    if not file.is_file():
        raise FetchError(
            f"There is no archive {file}.", cure=f"download {offered.name} from {source.page} and give its path"
        )
    known = {a.name: a.sha256 for a in (source.whole, *source.archives.values())}
    _check_hash(file, sha256 or known.get(file.name), progress, remove=False)
    return file


def _check_hash(file: Path, expected: str | None, progress: Progress | None, remove: bool) -> None:
    if expected is None:
        return
    size = file.stat().st_size
    if progress is not None:
        progress("check", 0, size)
    found = sha256_file(file)
    if progress is not None:
        progress("check", size, size)
    if found != expected.lower():
        if remove:
            file.unlink()
        raise FetchError(
            f"{file.name} is not the file that its publisher offers.",
            f"sha256 {found}, expected {expected}." + (" The file was removed." if remove else ""),
            "fetch it again; if the publisher has issued a new version, give its hash with --sha256",
        )


def _room(dest: Path, needed: int) -> None:
    folder = next(p for p in (dest, *dest.resolve().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"Not enough room in {dest}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.",
            "There must be room for both the archive and the unpacked images.",
            "free space, or choose another folder with --into",
        )


def _wanted(category: str, source: Source) -> tuple[str, ...]:
    if category == "all":
        return tuple(sorted(source.archives))
    if category in source.archives:
        return (category,)
    near = difflib.get_close_matches(category.lower(), list(source.archives), n=3, cutoff=0.5)
    listed = ", ".join(sorted(source.archives))
    raise ConfigError(
        f"{source.title} has no category {category!r}.",
        f"It has: {listed}.",
        f"did you mean {' or '.join(near)}?" if near else 'use one of these, or "all"',
    )


def _count(folder: Path) -> Counts:
    def images(path: Path) -> int:
        return sum(e.suffix.lower() in IMAGE_SUFFIXES for e in path.iterdir()) if path.is_dir() else 0

    test = folder / "test"
    bad = [entry for entry in (test.iterdir() if test.is_dir() else ()) if entry.name != GOOD]
    return Counts(images(folder / "train" / GOOD), images(test / GOOD), sum(images(entry) for entry in bad))


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _complete(folder: Path, counts: Counts) -> bool:
    return _count(folder) == counts
