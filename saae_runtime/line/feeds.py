"""How parts come to a station: each frame is one, or somebody asks and a picture is taken."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timezone
from pathlib import PurePath
from typing import Literal, Protocol

from ..meter import Meter, one_line
from .camera import BadFrameError, Camera, EndOfFrames, NoFrameError, Shot
from .part import Trigger, TriggerSource
from .recipes import Recipe

__all__ = ["Bind", "Feed", "FreeFeed", "Job", "TriggeredFeed"]

Bind = Callable[[Trigger], "Recipe | str"]
"""The recipe that a part is judged by, or why there is none."""

_POLL = 0.5  # seconds that a reader waits for a frame before it looks whether it should end
_PAUSE = 1.0  # seconds after a camera's unexpected error


@dataclass(frozen=True, eq=False)
class Job:
    """A part to be judged.

    Attributes:
        trigger: which part.
        shot: its frame; None where `problem` says why there is none.
        recipe: bound when the part came, so that a switch behind it changes nothing.
        problem: why it cannot be judged; empty where it can.
        started: when it came, by `time.monotonic`; None: the time counts from when it is judged.
        ended: whether the camera has come to its end, so that no later part will have a frame.
    """

    trigger: Trigger
    shot: Shot | None
    recipe: Recipe | None
    problem: str = ""
    started: float | None = None
    ended: bool = False


class Feed(Protocol):
    """Gives a station its parts, in order."""

    def next(self, timeout: float) -> Job | None:
        """The next part; None when none came within so many seconds.

        Raises:
            EndOfFrames: there are no more.
        """

    @property
    def source(self) -> TriggerSource | None:
        """Where verdicts go; None where nobody asked."""

    def close(self) -> None:
        """End it. May be called twice."""


class TriggeredFeed:
    """A part is asked for, then a picture of it is taken.

    Args:
        source: who asks.
        camera: takes the picture.
        bind: chooses the recipe.
        grab_timeout: seconds that the camera has.
    """

    def __init__(self, source: TriggerSource, camera: Camera, bind: Bind, grab_timeout: float) -> None:
        self._source, self._camera, self._bind = source, camera, bind
        self._timeout = grab_timeout

    @property
    def source(self) -> TriggerSource:
        """Who asks."""
        return self._source

    def next(self, timeout: float) -> Job | None:
        """The next part; see `Feed`."""
        trigger = self._source.wait(timeout)
        if trigger is None:
            return None
        started = time.monotonic()
        bound = self._bind(trigger)
        recipe, problem = (None, bound) if isinstance(bound, str) else (bound, "")
        shot, ended = None, False
        try:
            self._camera.trigger()
            shot = self._camera.grab(self._timeout)
        except EndOfFrames:
            ended = True
            problem = problem or "the camera has no more frames"
        except Exception as error:
            problem = problem or one_line(error)
        return Job(trigger, shot, recipe, problem, started, ended)

    def close(self) -> None:
        """End waiting."""
        self._source.close()


class FreeFeed:
    """Each frame of the camera is a part, read by a thread of its own.

    Args:
        camera: gives the frames.
        bind: chooses the recipe.
        queue: what happens to a frame when `size` others wait: `block` holds the camera up, `drop-oldest` throws the
            oldest away and counts it.
        size: see there.
        meter: counts `dropped` frames, and takes the camera's errors.
    """

    source = None

    def __init__(
        self, camera: Camera, bind: Bind, queue: Literal["block", "drop-oldest"], size: int, meter: Meter
    ) -> None:
        self._camera, self._bind, self._meter = camera, bind, meter
        self._drop, self._size = queue == "drop-oldest", size
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Job | None:
        """The next part; see `Feed`."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._ended or self._closed, timeout)
            if self._jobs:
                job = self._jobs.popleft()
                self._changed.notify_all()
                return job
            if self._ended or self._closed:
                raise EndOfFrames
            return None

    def close(self) -> None:
        """Take no further frame; those that wait are still given."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drop_waiting(self) -> None:
        """Throw away and count the waiting frames."""
        with self._changed:
            self._meter.count("dropped", len(self._jobs))
            self._jobs.clear()
            self._changed.notify_all()

    def _read(self) -> None:
        while not self._closed:
            try:
                self._put(self._grabbed())
            except NoFrameError as error:
                if self._camera.live and not self._camera.stats.connected:
                    self._meter.fail(error)
            except EndOfFrames:
                break
            except Exception as error:  # a camera that is gone: it looks for it itself, and no part is known here
                self._meter.fail(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, _PAUSE)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _grabbed(self) -> Job:
        try:
            shot = self._camera.grab(_POLL)
        except BadFrameError as error:
            trigger = Trigger(part_name(error.name, self._camera.live))
            return Job(trigger, None, None, one_line(error))
        if shot.dropped:
            self._meter.count("dropped", shot.dropped)
        started = time.monotonic() if self._camera.live else None
        trigger = Trigger(part_name(shot.name, self._camera.live, shot), None, shot.time)
        bound = self._bind(trigger)
        if isinstance(bound, str):
            return Job(trigger, shot, None, bound, started)
        return Job(trigger, shot, bound, "", started)

    def _put(self, job: Job) -> None:
        with self._changed:
            if self._drop:
                while len(self._jobs) >= self._size:
                    self._jobs.popleft()
                    self._meter.count("dropped")
            else:
                self._changed.wait_for(lambda: len(self._jobs) < self._size or self._closed)
            self._jobs.append(job)  # one that was read is judged, also at the end
            self._changed.notify_all()


def part_name(name: str, live: bool, shot: Shot | None = None) -> str:
    """A part's id for want of one: the file's name without folder and ending, or of a camera the time."""
    if not live and name:
        path = PurePath(name)
        page = path.suffix.partition("#")[2]
        return f"{path.stem}#{page}" if page else path.stem
    moment = Trigger("-").time if shot is None else shot.time
    return moment.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
