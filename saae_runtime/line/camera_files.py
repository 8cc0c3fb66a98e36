"""Files as cameras: a folder, a watched folder, a video."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from ..errors import ConfigError, SaaeError
from ..meter import one_line
from ..sources.files import Frame, find_sources, read_frames
from ..sources.scored import Scored
from ..sources.watch import FolderWatch
from .camera import BadFrameError, CameraStats, EndOfFrames, NoFrameError, Shot
from .part import now

__all__ = ["FileCamera", "WatchCamera", "open_files"]

_POLL = 0.2  # seconds between two checks of a folder


class _Counting:
    """Base class with the counts."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._grabbed = self._bad = self._dropped = self._reconnects = 0
        self._connected = True
        self._last_error = ""

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        return CameraStats(self._grabbed, self._dropped, self._bad, self._reconnects, self._connected, self._last_error)

    def trigger(self) -> None:
        """Do nothing: the next frame is used."""

    def _bad_frame(self, error: SaaeError | None, name: str, done: Callable[[], None] | None = None) -> BadFrameError:
        error = error or SaaeError(f"{name} cannot be read.")
        self._bad += 1
        self._last_error = one_line(error)
        return BadFrameError(error.what, error.why, error.cure, name, done)

    def close(self) -> None:
        """End it. May be called twice."""
        self._closed.set()


class FileCamera(_Counting):
    """Files in order: images, folders, patterns, videos; see `saae_runtime.sources.files.find_sources`.

    Args:
        name: as for `saae-run`.
        recursive: include subfolders.
        interval: seconds from one frame to the next, to simulate a line; 0: as fast as possible.
        repeat: start again at the end, endlessly.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.

    Raises:
        ConfigError, DataError: nothing there.
    """

    live = False

    def __init__(
        self,
        name: str,
        recursive: bool = False,
        interval: float = 0.0,
        repeat: bool = False,
        white_level: int | None = None,
    ) -> None:
        super().__init__()
        self._white_level = white_level
        self._sources = find_sources([name], recursive)
        self._interval, self._repeat = interval, repeat
        self._frames: Iterator[Frame] = read_frames(self._sources, self._white_level)
        self._next = time.monotonic()

    def grab(self, timeout: float) -> Shot:
        """The next frame; see `Camera`."""
        wait = self._next - time.monotonic()
        if self._closed.wait(min(max(wait, 0.0), timeout)):
            raise EndOfFrames
        if wait > timeout:
            raise NoFrameError("The next frame is not due yet.")
        frame = next(self._frames, None)
        if frame is None and self._repeat:
            self._frames = read_frames(self._sources, self._white_level)
            frame = next(self._frames, None)
        if frame is None:
            raise EndOfFrames
        self._next = time.monotonic() + self._interval
        name = frame.name if frame.source.kind == "image" else f"{frame.name}#{frame.index}"
        if frame.image is None:
            raise self._bad_frame(frame.error, name)
        self._grabbed += 1
        return Shot(frame.image, name, now())


class WatchCamera(_Counting):
    """Images that arrive in a folder, each once; see `saae_runtime.sources.watch.FolderWatch`.

    An image's time is that of its file. `memory` remembers which images have a record, so that a restart judges the
    rest.

    Args:
        folder: the watched folder.
        memory: path of the memory; None: all existing images count as new.
        recursive: include subfolders.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.

    Raises:
        ConfigError: no such folder.
    """

    live = False

    def __init__(
        self, folder: str, memory: Path | None = None, recursive: bool = False, white_level: int | None = None
    ) -> None:
        super().__init__()
        self._white_level = white_level
        if memory is not None:
            memory.parent.mkdir(parents=True, exist_ok=True)
        self._scored = Scored(memory) if memory is not None else None
        knows = self._scored.knows if self._scored is not None else lambda path, facts: False
        self._watch = FolderWatch([folder], recursive, say=self._say, knows=knows)
        self._frames = self._arriving()

    def _say(self, text: str) -> None:
        self._connected = "is back" in text
        self._reconnects += self._connected
        self._last_error = text

    def grab(self, timeout: float) -> Shot:
        """The next image; see `Camera`."""
        end = time.monotonic() + timeout
        while (frame := next(self._frames)) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise NoFrameError("No image has arrived.")
            if self._closed.wait(min(_POLL, left)):
                raise EndOfFrames
        if frame.image is None:
            raise self._bad_frame(frame.error, frame.name, self._done(frame))
        self._grabbed += 1
        moment = now() if frame.facts is None else datetime.fromtimestamp(frame.facts[1] / 1e9, timezone.utc)
        return Shot(frame.image, frame.name, moment, done=self._done(frame))

    def _arriving(self) -> Iterator[Frame | None]:
        """Frames as they arrive, each read when it is asked for; None after each check of the folder."""
        while True:
            yield from self._watch.poll(time.monotonic(), self._white_level)
            yield None

    def _done(self, frame: Frame) -> Callable[[], None] | None:
        """Remember that the file has its record."""
        scored, path, facts = self._scored, frame.source.path, frame.facts
        if scored is None or path is None or facts is None:  # set with a file's last page
            return None
        return lambda: scored.add(str(path.absolute()), facts)

    def close(self) -> None:
        """End it. May be called twice."""
        super().close()
        if self._scored is not None:
            self._scored.close()


def open_files(
    spec: str,
    memory: Path | None = None,
    recursive: bool = False,
    interval: float = 0.0,
    repeat: bool = False,
    white_level: int | None = None,
) -> FileCamera | WatchCamera:
    """Open a camera by its name: `watch:FOLDER`, or files, folders, patterns and videos as for `saae-run`.

    Args:
        spec: the name.
        memory: of a watched folder.
        recursive, interval, repeat, white_level: see `FileCamera`.

    Raises:
        ConfigError, DataError: nothing found, or an option that this camera does not have.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "watch" and colon:
        if interval or repeat:
            raise ConfigError(f"{spec}: `interval` and `repeat` apply to existing files only.")
        return WatchCamera(rest, memory, recursive, white_level)
    return FileCamera(spec, recursive, interval, repeat, white_level)
