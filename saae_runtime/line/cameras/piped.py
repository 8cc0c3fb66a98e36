"""Raw frames from another program, on standard input."""

from __future__ import annotations

import array
import os
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from ...errors import ConfigError
from ...images import most_pixels
from ..camera import BadFrameError, CameraStats, EndOfFrames, NoFrameError, Shot
from ..part import now
from .options import delay_of, known_only

__all__ = ["RawFrames", "open_stdin"]

_TICK = 0.1  # seconds of one wait for bytes
_CLOSE = 1.0  # seconds that `close` waits for the reading thread


def open_stdin(spec: str, options: Mapping[str, Any], triggered: bool = False) -> RawFrames:
    """Open raw frames on standard input: `stdin:640x480` (width x height, RGB), `stdin:640x480:gray`.

    Args:
        spec: the name.
        options: `delay`: see `delay_of`.
        triggered: see `RawFrames`.

    Raises:
        ConfigError: another name, an invalid option, or a frame would be too large.
    """
    known_only(options, ("delay",), "camera")
    found = re.fullmatch(r"stdin:(\d{1,6})x(\d{1,6})(:gray)?", spec)
    if found is None or not int(found[1]) * int(found[2]):
        raise ConfigError(f"{spec}: no frames on standard input.", "", "stdin:WIDTHxHEIGHT or stdin:WIDTHxHEIGHT:gray")
    width, height = int(found[1]), int(found[2])
    if width * height > most_pixels():
        raise ConfigError(f"{spec}: a frame has more than {most_pixels()} pixels.", "", "see SAAE_MAX_PIXELS")
    return RawFrames(sys.stdin.buffer, (height, width), 1 if found[3] else 3, triggered, delay_of(options))


class RawFrames:
    """Frames of one size from a pipe, read by a thread.

    Without a trigger each frame is given, in order; the pipe waits meanwhile. With one the pipe is read all the time,
    and of the frames that began after the trigger the newest counts.

    Args:
        stream: the pipe.
        size: (height, width).
        channels: 3 (RGB) or 1 (gray).
        triggered: whether parts are requested.
        delay: seconds after a trigger for which frames still show what was before it.
    """

    live = False

    def __init__(
        self, stream: BinaryIO, size: tuple[int, int], channels: int, triggered: bool = False, delay: float = 0.0
    ) -> None:
        self._descriptor = stream.fileno()
        self._stream = stream  # keeps the descriptor open
        self._shape = (*size, channels)
        self._length = size[0] * size[1] * channels
        self._triggered, self._delay = triggered, delay
        self._changed = threading.Condition()
        self._shot: Shot | None = None
        self._broken: BadFrameError | None = None
        self._stats = CameraStats()
        self._number = 0
        self._position = 0  # bytes read so far
        self._begin = 0  # bytes that had been written at the latest trigger; frames that begin before are for no part
        self._from = 0.0  # the same as a time
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._read, name="camera-stdin", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        with self._changed:
            return self._stats

    def trigger(self) -> None:
        """Only a frame that begins from now on counts."""
        with self._changed:
            self._shot = None
            self._begin = self._position + _waiting(self._descriptor)
            self._from = time.monotonic() + self._delay

    def grab(self, timeout: float) -> Shot:
        """The next frame; see `Camera`."""
        with self._changed:
            self._changed.wait_for(lambda: self._shot or self._ended or self._closed, timeout)
            if self._closed:
                raise EndOfFrames
            shot, self._shot = self._shot, None
            self._changed.notify_all()
            if shot is not None:
                self._stats = replace(self._stats, grabbed=self._stats.grabbed + 1)
                return shot
            if not self._ended:
                raise NoFrameError(f"standard input gave no frame within {timeout:g} s.")
            broken, self._broken = self._broken, None
            raise broken or EndOfFrames

    def close(self) -> None:
        """End it. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE)

    # --- the reading thread ---

    def _read(self) -> None:
        have = bytearray()
        began = 0.0
        while True:
            with self._changed:
                if not self._triggered:
                    self._changed.wait_for(lambda: self._shot is None or self._closed)
            chunk = self._chunk(self._length - len(have))
            if not chunk:
                break
            if not have:
                began = time.monotonic()
            have += chunk
            if len(have) == self._length:
                self._put(have, began)
                have = bytearray()
        with self._changed:
            self._ended = True
            if have and not self._closed:
                self._stats = replace(
                    self._stats, bad=self._stats.bad + 1, last_error="standard input ended within a frame"
                )
                self._broken = BadFrameError(
                    "standard input ended in the middle of a frame.",
                    f"{len(have)} of {self._length} bytes had arrived.",
                    "check the size that the other program writes",
                    f"stdin#{self._number + 1}",
                )
            self._changed.notify_all()

    def _chunk(self, most: int) -> bytes:
        """What comes next; nothing at the end, and after `close`."""
        try:
            while True:
                ready, _, _ = select.select([self._descriptor], [], [], _TICK)
                with self._changed:  # `trigger` counts what has been read, and what has not
                    if self._closed:
                        return b""
                    if ready:
                        chunk = os.read(self._descriptor, most)
                        self._position += len(chunk)
                        return chunk
        except OSError as error:  # it was closed
            with self._changed:
                self._stats = replace(self._stats, last_error=f"standard input: {error.strerror or error}")
            return b""

    def _put(self, data: bytearray, began: float) -> None:
        frame = np.frombuffer(data, np.uint8).reshape(self._shape)
        if self._shape[2] == 1:
            frame = np.repeat(frame, 3, axis=2)
        with self._changed:
            self._number += 1
            if self._position - self._length < self._begin or began < self._from:
                return
            self._shot = Shot(frame, f"stdin#{self._number}", now())
            self._changed.notify_all()


def _waiting(descriptor: int) -> int:
    """Number of bytes that are in a pipe and not read yet."""
    import fcntl
    import termios

    found = array.array("i", [0])
    try:
        fcntl.ioctl(descriptor, termios.FIONREAD, found)
    except OSError:  # not a pipe
        return 0
    return found[0]
