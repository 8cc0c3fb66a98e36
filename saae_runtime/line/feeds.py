"""How parts come to a station: each frame is a part, or a part is requested and a frame is taken."""

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
from .part import Trigger, TriggerSource, now
from .recipes import Recipe

__all__ = ["Bind", "Feed", "FreeFeed", "Job", "TriggeredFeed"]

Bind = Callable[[Trigger], "Recipe | str"]
"""The recipe of a part, or why there is none."""

_POLL = 0.5  # seconds of one wait for a frame, after which a reader checks whether to end
_PAUSE = 1.0  # seconds of pause after a camera's unexpected error


@dataclass(frozen=True, eq=False)
class Job:
    """A part to be judged.

    Attributes:
        trigger: which part.
        shot: its frame; None if `problem` says why there is none.
        recipe: bound when the part came, so that a later switch changes nothing.
        problem: why it cannot be judged; empty if it can.
        started: when it came, by `time.monotonic`; None: time counts from when it is judged.
        ended: whether the camera has ended, so that no later part will have a frame.
        done: called when its record is written; None: not needed.
    """

    trigger: Trigger
    shot: Shot | None
    recipe: Recipe | None
    problem: str = ""
    started: float | None = None
    ended: bool = False
    done: Callable[[], None] | None = None


class Feed(Protocol):
    """Gives a station its parts, in order."""

    def next(self, timeout: float) -> Job | None:
        """The next part; None if none came within `timeout` seconds.

        Raises:
            EndOfFrames: there are no more.
        """

    @property
    def source(self) -> TriggerSource | None:
        """Where verdicts go; None if the part was not requested."""

    def close(self) -> None:
        """End it. May be called twice."""


class TriggeredFeed:
    """Each request is a part, of which a frame is taken.

    Args:
        source: of the requests.
        camera: takes the frame.
        bind: chooses the recipe.
        grab_timeout: seconds for the camera to give a frame.
        meter: counts `dropped` frames, which came without a request.
    """

    def __init__(self, source: TriggerSource, camera: Camera, bind: Bind, grab_timeout: float, meter: Meter) -> None:
        self._source, self._camera, self._bind, self._meter = source, camera, bind, meter
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
        shot, ended, done = None, False, None
        try:
            self._camera.trigger()
            shot = self._camera.grab(self._timeout)
            done = shot.done
            self._meter.count("dropped", shot.dropped)
        except EndOfFrames:
            ended = True
            problem = problem or "the camera has no more frames"
        except Exception as error:
            problem = problem or one_line(error)
            done = error.done if isinstance(error, BadFrameError) else None
        return Job(trigger, shot, recipe, problem, started, ended, done)

    def close(self) -> None:
        """End waiting."""
        self._source.close()


class FreeFeed:
    """Each frame of the camera is a part, read on a separate thread.

    Args:
        camera: gives the frames.
        bind: chooses the recipe.
        queue: what happens to a frame if `size` others wait: `block` delays the camera, `drop-oldest` drops the oldest
            and counts it.
        size: largest number of waiting frames.
        meter: counts `dropped` frames and records the camera's errors.
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
        """Take no further frames; waiting ones are still judged."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def drop_waiting(self) -> None:
        """Drop and count the waiting frames."""
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
            except Exception as error:  # a lost camera reconnects by itself, and no part is known here
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
            trigger = Trigger(part_name(error.name, self._camera.live), None, error.time or now(), error.mark)
            return Job(trigger, None, None, one_line(error), done=error.done)
        if shot.dropped:
            self._meter.count("dropped", shot.dropped)
        started = time.monotonic() if self._camera.live else None
        trigger = Trigger(part_name(shot.name, self._camera.live, shot), None, shot.time, shot.mark)
        bound = self._bind(trigger)
        if isinstance(bound, str):
            return Job(trigger, shot, None, bound, started, done=shot.done)
        return Job(trigger, shot, bound, "", started, done=shot.done)

    def _put(self, job: Job) -> None:
        with self._changed:
            if self._drop:
                while len(self._jobs) >= self._size:
                    self._jobs.popleft()
                    self._meter.count("dropped")
            else:
                self._changed.wait_for(lambda: len(self._jobs) < self._size or self._closed)
            self._jobs.append(job)  # a frame that was read is judged, also at the end
            self._changed.notify_all()


def part_name(name: str, live: bool, shot: Shot | None = None) -> str:
    """Default part id: the file's name without folder and ending, or for a camera the time."""
    if not live and name:
        path = PurePath(name)
        page = path.suffix.partition("#")[2]
        return f"{path.stem}#{page}" if page else path.stem
    moment = Trigger("-").time if shot is None else shot.time
    return moment.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
