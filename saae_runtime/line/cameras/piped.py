"""Raw frames from another program, on standard input."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from ...errors import ConfigError
from ...images import most_pixels
from ..camera import BadFrameError, CameraStats, EndOfFrames, NoFrameError, Shot
from ..part import now
from .options import known_only

__all__ = ["RawFrames", "open_stdin"]


def open_stdin(spec: str, options: Mapping[str, Any]) -> RawFrames:
    """Open raw frames on standard input: `stdin:640x480` (width x height, RGB), `stdin:640x480:gray`.

    Raises:
        ConfigError: another name, or a frame would be too large.
    """
    known_only(options, (), "camera")
    found = re.fullmatch(r"stdin:(\d{1,6})x(\d{1,6})(:gray)?", spec)
    if found is None or not int(found[1]) * int(found[2]):
        raise ConfigError(f"{spec}: no frames on standard input.", "", "stdin:WIDTHxHEIGHT or stdin:WIDTHxHEIGHT:gray")
    width, height = int(found[1]), int(found[2])
    if width * height > most_pixels():
        raise ConfigError(f"{spec}: a frame has more than {most_pixels()} pixels.", "", "see SAAE_MAX_PIXELS")
    return RawFrames(sys.stdin.buffer, (height, width), 1 if found[3] else 3)


class RawFrames:
    """Frames of one size from a pipe.

    Args:
        stream: the pipe.
        size: (height, width).
        channels: 3 (RGB) or 1 (gray).
    """

    live = False

    def __init__(self, stream: BinaryIO, size: tuple[int, int], channels: int) -> None:
        self._descriptor = stream.fileno()
        self._stream = stream  # keeps the descriptor open
        self._shape = (*size, channels)
        self._length = size[0] * size[1] * channels
        self._have = bytearray()
        self._stats = CameraStats()
        self._number = 0
        self._closed = False

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        return self._stats

    def trigger(self) -> None:
        """Do nothing: the next frame is used."""

    def grab(self, timeout: float) -> Shot:
        """The next frame; after a time-out its first part is kept."""
        end = time.monotonic() + timeout
        while len(self._have) < self._length:
            # in short steps, so that `close` ends it
            ready, _, _ = select.select([self._descriptor], [], [], max(min(end - time.monotonic(), 0.1), 0))
            if self._closed:
                raise EndOfFrames
            if ready:
                chunk = os.read(self._descriptor, self._length - len(self._have))
                if not chunk:
                    self._end()
                self._have += chunk
            elif time.monotonic() >= end:
                raise NoFrameError(f"standard input gave no frame within {timeout:g} s.")
        frame = np.frombuffer(bytearray(self._have), np.uint8).reshape(self._shape)
        self._have.clear()
        if self._shape[2] == 1:
            frame = np.repeat(frame, 3, axis=2)
        self._number += 1
        self._stats = replace(self._stats, grabbed=self._stats.grabbed + 1)
        return Shot(frame, f"stdin#{self._number}", now())

    def _end(self) -> None:
        left = len(self._have)
        self._have.clear()
        if left:
            self._stats = replace(
                self._stats, bad=self._stats.bad + 1, last_error="standard input ended within a frame"
            )
            raise BadFrameError(
                "standard input ended in the middle of a frame.",
                f"{left} of {self._length} bytes had arrived.",
                "check the size that the other program writes",
                f"stdin#{self._number + 1}",
            )
        raise EndOfFrames

    def close(self) -> None:
        """End it. May be called twice."""
        self._closed = True
