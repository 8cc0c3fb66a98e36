"""Turns names on a command line into frames in order."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, ImageError, SaaeError
from ..images import IMAGE_SUFFIXES, check_readable, read_pages
from .folders import expand, filing_stem, fixed_part, images_below
from .video import VIDEO_SUFFIXES, camera_frames, check_camera, check_video, frame_count, video_frames

__all__ = ["Facts", "Frame", "Source", "facts_of", "find_sources", "image_frames", "read_frames", "unique_stem"]

Facts = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds, which identify a file together with its name."""


@dataclass(frozen=True)
class Source:
    """One image file, video file or camera.

    kind: "image", "video" or "camera". name: as reported with each result. stem: relative path, without ending,
    under which pictures of its results are filed; unique within one `find_sources` call.
    """

    kind: str
    name: str
    stem: PurePath
    path: Path | None = None
    camera: int | None = None

    @property
    def live(self) -> bool:
        """Whether frames come in real time, without end."""
        return self.kind == "camera"

    def count(self) -> int | None:
        """Number of frames, if known in advance."""
        if self.kind == "image":
            return 1
        return frame_count(self.path) if self.path is not None else None


@dataclass(frozen=True)
class Frame:
    """One frame, or an error.

    index: number within its source, from 0. image: uint8 H x W x 3, RGB; None if there is an `error`. page: number from
    1 in a file of several pages. facts: of an image file, with its last frame.
    """

    source: Source
    index: int
    image: NDArray[np.uint8] | None
    error: SaaeError | None = None
    page: int | None = None
    facts: Facts | None = None

    @property
    def name(self) -> str:
        """The source's name; that of a page is `part.tif#2`."""
        return self.source.name if self.page is None else f"{self.source.name}#{self.page}"

    @property
    def stem(self) -> PurePath:
        """Relative path, without ending, under which pictures of this frame are filed."""
        if self.source.kind != "image":
            return self.source.stem / f"{self.index:06d}"
        stem = self.source.stem
        return stem if self.page is None else stem.with_name(f"{stem.name}#{self.page}")


def find_sources(names: Sequence[str], recursive: bool = False) -> list[Source]:
    """Resolve names into sources, before slow work.

    A name is an image file, a video file, a folder (its images, sorted by name; other files are skipped), a glob
    pattern (`**` crosses folders), or `camera:N`. A named file must have the ending of an image or a video.

    Args:
        names: as typed.
        recursive: whether folders below a named folder are read too.

    Raises:
        ConfigError: another name, or a missing library.
        DataError: a folder or pattern without any image.
    """
    found: list[tuple[Path | None, PurePath, int | None]] = []
    several = len(names) > 1
    for name in names:
        found.extend(_resolve(name, recursive, several))
    stems = _filed(found)
    sources = []
    for (path, _, camera), stem in zip(found, stems, strict=True):
        if path is None:
            sources.append(Source("camera", f"camera:{camera}", stem, camera=camera))
        else:
            sources.append(Source("video" if _is_video(path) else "image", str(path), stem, path=path))
    if any(source.kind == "video" for source in sources):
        check_video()
    if any(source.kind == "camera" for source in sources):
        check_camera()
    return sources


def _filed(found: Sequence[tuple[Path | None, PurePath, int | None]]) -> list[PurePath]:
    """A stem for each source, so that no two frames of all of them are filed under one.

    A video's frames lie below its stem, `clip/000000`, and pages are `part#2`: no other source may have these names.
    """
    taken: set[str] = set()
    stems: dict[int, PurePath] = {}
    several = [_is_video(path) for path, _, _ in found]
    names = {stem.name for _, stem, _ in found}
    for place in sorted(range(len(found)), key=several.__getitem__):  # images first
        stem = found[place][1]
        page = re.fullmatch(r"(.+)#[0-9]+", stem.name)
        if several[place]:
            below = {str(parent).lower() for name in taken for parent in PurePath(name).parents}
            while str(stem).lower() in below:
                stem = stem.with_name(f"{stem.name}-video")
        elif page and page[1] in names:
            stem = stem.with_name(f"{stem.name}-file")
        stems[place] = unique_stem(stem, taken)
    return [stems[place] for place in range(len(found))]


def _is_video(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() in VIDEO_SUFFIXES


def read_frames(sources: Sequence[Source], white_level: int | None = None) -> Iterator[Frame]:
    """Read all frames of all sources, in order. A frame that cannot be read is a Frame with an error.

    Args:
        sources: from `find_sources`.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.

    Raises:
        DeviceError: a camera cannot be opened or is lost.
    """
    for source in sources:
        if source.kind == "image" and source.path is not None:
            yield from image_frames(source, white_level=white_level)
            continue
        if source.path is not None:
            try:
                check_readable(source.path)
            except DataError as error:
                yield Frame(source, 0, None, error)
                continue
        decoded = camera_frames(source.camera or 0) if source.path is None else video_frames(source.path)
        for index, item in enumerate(decoded):
            if isinstance(item, SaaeError):
                yield Frame(source, index, None, item)
            else:
                yield Frame(source, index, item)


def image_frames(source: Source, facts: Facts | None = None, white_level: int | None = None) -> Iterator[Frame]:
    """The frames of an image file: one, or one per page. An unreadable one is a frame with an error.

    Args:
        source: an image.
        facts: of the file before reading; None: looked up.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.
    """
    assert source.path is not None
    facts = facts or facts_of(source.path)
    last: Frame | None = None
    try:
        for number, count, item in read_pages(source.path, white_level):
            if last is not None:
                yield last
            page = number if count > 1 else None
            if isinstance(item, ImageError):
                last = Frame(source, number - 1, None, item, page)
            else:
                last = Frame(source, number - 1, item, None, page)
    except DataError as error:
        last = Frame(source, 0, None, error)
    if last is not None:
        yield replace(last, facts=facts)


def facts_of(path: Path) -> Facts | None:
    """A file's facts; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _resolve(name: str, recursive: bool, several: bool) -> list[tuple[Path | None, PurePath, int | None]]:
    camera = re.fullmatch(r"camera:(\d{1,3})", name)
    if camera:
        return [(None, PurePath(f"camera{int(camera[1])}"), int(camera[1]))]
    if name.startswith("camera:"):
        raise ConfigError(f"{name}: not a camera.", "A camera is named by its number.", "camera:0 for the first one")
    path = Path(name)
    if path.is_dir():
        files = images_below(path, recursive)
        if not files:
            deeper = "" if recursive else " Folders below it are read only with --recursive."
            raise DataError(
                f"{path}: no images in this folder.",
                f"Files ending in {', '.join(sorted(IMAGE_SUFFIXES))} count.{deeper}",
                "name the folder that holds the images" + ("" if recursive else ", or add --recursive"),
            )
        # Two folders often hold the same names (000.png); their pictures must not overwrite each other.
        prefix = PurePath(path.resolve().name) if several else PurePath()
        return [(file, prefix / filing_stem(file.relative_to(path)), None) for file in files]
    if path.exists():
        if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise ConfigError(
                f"{path}: neither an image nor a video by its name.",
                f"Known endings: {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}.",
                "give the file the ending of its format",
            )
        return [(path, filing_stem(PurePath(path.name)), None)]
    if glob.has_magic(name):
        return _matches(name)
    raise ConfigError(
        f"{name}: no such file or folder.", _near_names(path), "check the path; quote a pattern: 'a/*.png'"
    )


def _matches(pattern: str) -> list[tuple[Path | None, PurePath, int | None]]:
    files = [
        path for path in expand(pattern) if not path.is_dir() and path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
    ]
    if not files:
        raise DataError(
            f"{pattern}: the pattern matches no image or video.",
            "`*` stays within one folder, `**` crosses folders.",
            "try the pattern with ls",
        )
    root, _ = fixed_part(pattern)
    # A pattern may contain `..` (`a/*/../b.png`); the path of its pictures must not.
    inside = [PurePath(*(part for part in file.relative_to(root).parts if part != "..")) for file in files]
    return [(file, filing_stem(path), None) for file, path in zip(files, inside, strict=True)]


def _near_names(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"The folder {parent} is not there either."
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3, cutoff=0.6)
    return f"Near names in {parent}: {', '.join(sorted(near))}." if near else f"{parent} holds no name like it."


def unique_stem(stem: PurePath, taken: set[str]) -> PurePath:
    """`stem`, with a number if it is in `taken` (lower case), to which it is added."""
    candidate, number = stem, 2
    # Compared without case: on some file systems A.png and a.png are the same.
    while str(candidate).lower() in taken:
        candidate = stem.with_name(f"{stem.name}-{number}")
        number += 1
    taken.add(str(candidate).lower())
    return candidate
