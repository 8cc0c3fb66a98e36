"""Files as cameras: a folder, a watched folder, a video."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DeviceError, SaaeError
from ..meter import one_line
from ..sources.files import Facts, Frame, facts_of, find_sources, read_frames
from ..sources.scored import Scored
from ..sources.watch import FolderWatch
from .camera import BadFrameError, CameraStats, EndOfFrames, NoFrameError, Shot
from .part import now

__all__ = ["FileCamera", "WatchCamera", "open_files"]

_POLL = 0.2  # seconds between two checks of a folder
_SEEK = 1.0  # seconds between two checks whether an unavailable folder is back


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

    def _bad_frame(self, error: SaaeError | None, name: str, **part: Any) -> BadFrameError:
        error = error or SaaeError(f"{name} cannot be read.")
        self._bad += 1
        self._last_error = one_line(error)
        return BadFrameError(error.what, error.why, error.cure, name, **part)

    def close(self) -> None:
        """End it. May be called twice."""
        self._closed.set()


class FileCamera(_Counting):
    """Files in order: images, folders, patterns, videos; see `saae_runtime.sources.files.find_sources`.

    With a trigger it simulates a camera: each part gets the next frame.

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

    def trigger(self) -> None:
        """Do nothing: the next frame is used."""

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

    An image's time is that of its file. Files of the same name and time in other folders are other parts, see
    `Shot.mark`. `memory` remembers which images have a record, so that a restart judges the rest. Without it, each
    image is a new part at each start. With a trigger, images that have come without one belong to no part: they are
    counted as dropped.

    Args:
        folder: the watched folder.
        memory: path of the memory; None: all existing images count as new.
        recursive: include subfolders.
        white_level: of 16-bit files, see `saae_runtime.images.read_image`.
        looking: leave the memory as it is; a running line may be writing it.

    Raises:
        ConfigError: no such folder.
    """

    live = False

    def __init__(
        self,
        folder: str,
        memory: Path | None = None,
        recursive: bool = False,
        white_level: int | None = None,
        looking: bool = False,
    ) -> None:
        super().__init__()
        self._white_level = white_level
        if memory is not None and not looking:
            memory.parent.mkdir(parents=True, exist_ok=True)
        self._scored = Scored(memory, looking=looking) if memory is not None else None
        knows = self._scored.knows if self._scored is not None else lambda path, facts: False
        self._folder = folder
        self._watch = FolderWatch([folder], recursive, self._say, knows, self._note)
        self._frames = self._arriving()
        self._more_pages = self._asked = False
        self._told = 0  # of the dropped ones
        self._seeker = threading.Thread()

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        return replace(super().stats, dropped=self._dropped + self._watch.left_out)

    def trigger(self) -> None:
        """Leave out everything that has come so far, complete or not: only an image from now on counts.

        Raises:
            DeviceError: the folder is unavailable, so that nobody knows what has come.
        """
        self._asked = True
        self._frames = self._arriving()
        self._dropped += self._more_pages
        self._more_pages = False
        try:
            found = self._watch.leave_out(time.monotonic())
        except OSError as error:
            away = DeviceError(f"{self._folder} is away.", error.strerror or str(error), "check the share")
            self._is_away(str(away))
            raise away from error
        self._is_back()
        if found:
            self._last_error = one_line(f"{found[-1]} belongs to no part: it was there before the trigger.")

    def _note(self, text: str) -> None:
        self._last_error = text

    def _say(self, text: str) -> None:
        if "is back" in text:
            self._is_back()
        else:
            self._is_away(text)

    def _is_away(self, text: str) -> None:
        self._connected, self._last_error = False, one_line(text)
        if self._asked and not self._seeker.is_alive():  # a station in fault asks for no image that would show it
            self._seeker = threading.Thread(target=self._seek, name=f"seek-{self._folder}", daemon=True)
            self._seeker.start()

    def _is_back(self) -> None:
        self._reconnects += not self._connected
        self._connected = True

    def _seek(self) -> None:
        """Wait until the folder can be listed again."""
        while not self._connected and not self._closed.wait(_SEEK):
            with suppress(OSError):
                os.scandir(self._folder).close()
                self._is_back()

    def grab(self, timeout: float) -> Shot:
        """The next image; see `Camera`."""
        end = time.monotonic() + timeout
        while (frame := next(self._frames)) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise NoFrameError("No image has arrived.")
            if self._closed.wait(min(_POLL, left)):
                raise EndOfFrames
        self._more_pages = frame.page is not None and frame.facts is None
        facts = frame.facts or (None if frame.source.path is None else facts_of(frame.source.path))
        moment = now() if facts is None else datetime.fromtimestamp(facts[1] / 1e9, timezone.utc)
        if frame.image is None:
            mark = self._mark(frame, facts)
            raise self._bad_frame(frame.error, frame.name, done=self._done(frame), time=moment, mark=mark)
        self._grabbed += 1
        dropped = self.stats.dropped
        new, self._told = dropped - self._told, dropped
        return Shot(frame.image, frame.name, moment, new, done=self._done(frame), mark=self._mark(frame, facts))

    def _mark(self, frame: Frame, facts: Facts | None) -> str:
        """What tells a frame apart: its file below the folder, the file's facts, its pixels; with no memory, when."""
        pixels = 0 if frame.image is None else zlib.crc32(np.ascontiguousarray(frame.image).data)
        again = "" if self._scored is not None else time.time_ns()
        name = os.path.relpath(frame.name, self._folder)
        told = f"{name}\n{facts}\n{pixels}\n{again}"
        return hashlib.blake2b(os.fsencode(told), digest_size=6).hexdigest()

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
    looking: bool = False,
) -> FileCamera | WatchCamera:
    """Open a camera by its name: `watch:FOLDER`, or files, folders, patterns and videos as for `saae-run`.

    Args:
        spec: the name.
        memory: of a watched folder.
        looking: see `WatchCamera`.
        recursive, interval, repeat, white_level: see `FileCamera`.

    Raises:
        ConfigError, DataError: nothing found, or an option that this camera does not have.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "watch" and colon:
        if interval or repeat:
            raise ConfigError(f"{spec}: `interval` and `repeat` apply to existing files only.")
        return WatchCamera(rest, memory, recursive, white_level, looking)
    return FileCamera(spec, recursive, interval, repeat, white_level)
