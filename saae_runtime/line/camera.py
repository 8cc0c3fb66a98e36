"""The interface of all cameras."""

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
    """The camera gave no frame in time; it may give one the next time."""


class BadFrameError(SaaeError):
    """One frame is lost: damaged on its way, or a file that is not an image.

    `name` is the frame's. `done` is called when the record of its part is written; `time` and `mark` say which part it
    is, if the frame has them; all as for a `Shot`.
    """

    def __init__(
        self,
        what: str,
        why: str = "",
        cure: str = "",
        name: str = "",
        done: Callable[[], None] | None = None,
        time: datetime | None = None,
        mark: str = "",
    ) -> None:
        super().__init__(what, why, cure)
        self.name, self.done, self.time, self.mark = name, done, time, mark


class EndOfFrames(Exception):
    """The camera has no more frames: the end of a folder, a video or standard input."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One frame of a camera.

    Attributes:
        frame: uint8 H x W x 3 (RGB), in its own memory.
        name: of the frame: a file's path, or the camera and a number.
        time: when it was taken or read, UTC.
        dropped: frames that were lost or dropped between the previous shot and this one.
        done: called when the shot's record is written; None: not needed.
        mark: what tells it apart from shots of the same name and time; the same when the same shot is given again after
            a kill. Empty: its time tells it apart.
    """

    frame: NDArray[np.uint8]
    name: str
    time: datetime
    dropped: int = 0
    done: Callable[[], None] | None = None
    mark: str = ""


@dataclass(frozen=True)
class CameraStats:
    """Counts of a camera since it was opened.

    Attributes:
        grabbed: frames given to the station.
        dropped: frames lost, or dropped for newer ones.
        bad: damaged frames.
        reconnects: how often it was reconnected.
        connected: whether it is connected now.
        last_error: text of the latest error; empty for none.
    """

    grabbed: int = 0
    dropped: int = 0
    bad: int = 0
    reconnects: int = 0
    connected: bool = True
    last_error: str = ""


class Camera(Protocol):
    """A source of frames. Used by one thread, except `close` and `stats`, which any thread may call."""

    @property
    def live(self) -> bool:
        """Whether it runs by itself, so that frames not fetched in time are lost; False for a folder or a file."""

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""

    def trigger(self) -> None:
        """Take one frame now: frames that were taken before it are for no part.

        Raises:
            DeviceError: the camera is not connected.
        """

    def grab(self, timeout: float) -> Shot:
        """The next frame.

        Raises:
            NoFrameError: none within `timeout` seconds; a lost camera is reconnected meanwhile.
            BadFrameError: a frame arrived damaged.
            EndOfFrames: there are no more.
        """

    def close(self) -> None:
        """Release the camera; a running `grab` ends. May be called twice."""
