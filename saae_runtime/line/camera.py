"""What a station asks of a camera, whatever is behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, SaaeError

__all__ = ["BadFrameError", "Camera", "CameraStats", "EndOfFrames", "NoFrameError", "Shot"]


class NoFrameError(DeviceError):
    """A camera that gave no frame in time; it may give one the next time."""


class BadFrameError(SaaeError):
    """One frame that is lost: broken on the wire, or a file that is no image. `name` is the frame's."""

    def __init__(self, what: str, why: str = "", cure: str = "", name: str = "") -> None:
        super().__init__(what, why, cure)
        self.name = name


class EndOfFrames(Exception):
    """A camera with an end has come to it: a folder, a video, standard input."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One frame of a camera.

    Attributes:
        frame: uint8 H x W x 3 (RGB), this shot's own memory.
        name: of the frame: a file's path, or the camera and a number.
        time: when it was taken or read, UTC.
        dropped: frames that the camera lost or threw away between the shot before and this one.
        done: called once the shot's record is written; None where nothing has to know.
    """

    frame: NDArray[np.uint8]
    name: str
    time: datetime
    dropped: int = 0
    done: Callable[[], None] | None = None


@dataclass(frozen=True)
class CameraStats:
    """What a camera has done since it was opened.

    Attributes:
        grabbed: frames given to the station.
        dropped: frames lost, or thrown away because newer ones had come.
        bad: frames that came broken.
        reconnects: how often it was away and came back.
        connected: whether it is there now.
        last_error: the latest error, in words; empty for none.
    """

    grabbed: int = 0
    dropped: int = 0
    bad: int = 0
    reconnects: int = 0
    connected: bool = True
    last_error: str = ""


class Camera(Protocol):
    """Frames, one after the other. Used by one thread, but for `close` and `stats`, which any thread may call."""

    @property
    def live(self) -> bool:
        """Whether it goes on by itself, so that frames not fetched in time are lost: False for a folder or a file."""

    @property
    def stats(self) -> CameraStats:
        """What it has done so far."""

    def trigger(self) -> None:
        """Take one picture now, by software; nothing to do for a camera that runs freely.

        Raises:
            DeviceError: it is not there.
        """

    def grab(self, timeout: float) -> Shot:
        """The next frame.

        Raises:
            NoFrameError: none within so many seconds; a camera that is away is looked for again meanwhile.
            BadFrameError: a frame came and is of no use.
            EndOfFrames: there are no more.
        """

    def close(self) -> None:
        """Let go of the camera; a `grab` under way ends. May be called twice."""
