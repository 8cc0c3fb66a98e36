"""Where frames come from: what the user names on a command line, turned into frames in order."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, SaaeError
from ..images import IMAGE_SUFFIXES, read_image
from .video import VIDEO_SUFFIXES, camera_frames, check_camera, check_video, frame_count, video_frames

__all__ = ["Frame", "Source", "find_sources", "images_below", "read_frames", "unique_stem"]


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
        """Number of frames as far as it is known beforehand."""
        if self.kind == "image":
            return 1
        return frame_count(self.path) if self.path is not None else None


@dataclass(frozen=True)
class Frame:
    """One frame, or the error in its place.

    index: number within its source, from 0. image: uint8 H x W x 3, RGB; None where `error` says why.
    """

    source: Source
    index: int
    image: NDArray[np.uint8] | None
    error: SaaeError | None = None

    @property
    def stem(self) -> PurePath:
        """Relative path, without ending, under which pictures of this frame are filed."""
        if self.source.kind == "image":
            return self.source.stem
        return self.source.stem / f"{self.index:06d}"


def find_sources(names: Sequence[str], recursive: bool = False) -> list[Source]:
    """Resolves what was named into sources, before anything slow is started.

    A name is an image file, a video file, a folder (its images, sorted by name; other files are passed over), a
    glob pattern (`**` crosses folders), or `camera:N`. A file that is named outright must look like an image or a
    video.

    Args:
        names: as typed.
        recursive: whether folders below a named folder are read too.

    Raises:
        ConfigError: a name that is none of these, or a library that is needed for it is missing.
        DataError: a folder or pattern without any image.
    """
    found: list[tuple[Path | None, PurePath, int | None]] = []
    several = len(names) > 1
    for name in names:
        found.extend(_resolve(name, recursive, several))
    taken: set[str] = set()
    sources = []
    for path, stem, camera in found:
        unique = unique_stem(stem, taken)
        if path is None:
            sources.append(Source("camera", f"camera:{camera}", unique, camera=camera))
        else:
            kind = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"
            sources.append(Source(kind, str(path), unique, path=path))
    if any(source.kind == "video" for source in sources):
        check_video()
    if any(source.kind == "camera" for source in sources):
        check_camera()
    return sources


def read_frames(sources: Sequence[Source], white_level: int | None = None) -> Iterator[Frame]:
    """Reads all frames of all sources, in order. A frame that cannot be read is a Frame with an error.

    Args:
        sources: from `find_sources`.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.

    Raises:
        DeviceError: a camera cannot be opened or has gone.
    """
    for source in sources:
        if source.kind == "image" and source.path is not None:
            try:
                yield Frame(source, 0, read_image(source.path, white_level))
            except DataError as error:
                yield Frame(source, 0, None, error)
            continue
        decoded = camera_frames(source.camera or 0) if source.path is None else video_frames(source.path)
        for index, item in enumerate(decoded):
            if isinstance(item, SaaeError):
                yield Frame(source, index, None, item)
            else:
                yield Frame(source, index, item)


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
        return [(file, prefix / file.relative_to(path).with_suffix(""), None) for file in files]
    if path.exists():
        if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise ConfigError(
                f"{path}: neither an image nor a video by its name.",
                f"Known endings: {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}.",
                "rename the file after what it holds",
            )
        return [(path, PurePath(path.stem), None)]
    if glob.has_magic(name):
        return _matches(name)
    raise ConfigError(
        f"{name}: no such file or folder.", _near_names(path), "check the path; quote a pattern: 'a/*.png'"
    )


def images_below(folder: Path, recursive: bool = False, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """The image files of a folder, sorted by name; hidden ones are passed over.

    Args:
        folder: where.
        recursive: whether folders below it are read too.
        onerror: called for a folder that cannot be listed, which else counts as empty.
    """
    found: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=onerror):
        folders[:] = sorted(entry for entry in folders if not entry.startswith(".")) if recursive else []
        found.extend(
            Path(root) / file
            for file in sorted(files)
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES
        )
    return found


def _matches(pattern: str) -> list[tuple[Path | None, PurePath, int | None]]:
    files = [
        path
        for path in map(Path, sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207 (Path.glob takes no absolute ones)
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
    ]
    if not files:
        raise DataError(
            f"{pattern}: the pattern matches no image or video.",
            "`*` stays within one folder, `**` crosses folders.",
            "try the pattern with ls",
        )
    fixed: list[str] = []
    for part in Path(pattern).parent.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed) if fixed else Path()
    # A pattern may climb (`a/*/../b.png`); where its pictures are filed must not.
    stems = [[part for part in file.relative_to(root).with_suffix("").parts if part != ".."] for file in files]
    return [(file, PurePath(*stem), None) for file, stem in zip(files, stems, strict=True)]


def _near_names(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"The folder {parent} is not there either."
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3, cutoff=0.6)
    return f"Near names in {parent}: {', '.join(sorted(near))}." if near else f"{parent} holds no name like it."


def unique_stem(stem: PurePath, taken: set[str]) -> PurePath:
    """`stem`, numbered where it is among `taken` (in lower case), and added to them."""
    candidate, number = stem, 2
    # Compared without case: some file systems do not tell A.png from a.png.
    while str(candidate).lower() in taken:
        candidate = stem.with_name(f"{stem.name}-{number}")
        number += 1
    taken.add(str(candidate).lower())
    return candidate
