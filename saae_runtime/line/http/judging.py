"""Pictures of requests, judged: computed together where several wait, and behind the parts of the line."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError
from ...result import Result
from ..recipes import Recipe
from .yielding import give_way

__all__ = ["Batcher", "BusyError", "Judged"]

_YIELD = 0.25  # seconds at most that requests wait for the parts of the line, before each batch
_ACTIVE = 5.0  # seconds after a part of the line during which requests take one picture at a time, and every other turn
_LONGEST_TURN = 0.5  # seconds that they leave to the line after a batch at most
_STEP = 0.002
_WAITING_BYTES = 512 << 20  # of frames that wait


class BusyError(DeviceError):
    """So many pictures wait already; one more would only make all of them late."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A picture's result, the recipe that gave it, and how many pictures were computed together."""

    result: Result
    recipe: Recipe
    together: int


@dataclass(frozen=True, eq=False)
class _Task:
    frame: NDArray[np.uint8]
    recipe: Recipe
    future: Future[Judged]


class Batcher:
    """Computes what waits, in order, on one thread; what came while it computed is computed together.

    Pictures of the same recipe are one call of the engine. A task whose future is cancelled by then is not computed.
    One picture that cannot be judged costs the others nothing: they are computed again one by one.

    The line goes first. While its stations have parts, a batch is one picture, so that a part waits for one computation
    at most; after each the thread rests as long as it computed; and it has a lower priority.

    Args:
        most: pictures in one call.
        waiting: pictures that may wait.
        busy: whether the line computes a verdict; then requests wait, a quarter of a second at most.
    """

    def __init__(self, most: int, waiting: int, busy: Callable[[], bool] = lambda: False) -> None:
        self._bytes = 0
        self._most, self._waiting, self._busy = most, waiting, busy
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._closed = False
        self._line_seen = float("-inf")
        self._thread = threading.Thread(target=self._run, name="http-judge", daemon=True)
        self._thread.start()

    def admit(self) -> None:
        """Refuse early, before a body is read and decoded for nothing.

        Raises:
            BusyError: too many wait, or it is closed.
        """
        with self._changed:
            self._check(0)

    def _check(self, size: int) -> None:
        if self._closed:
            raise BusyError("The service is stopping.")
        if len(self._tasks) >= self._waiting or (self._tasks and self._bytes + size > _WAITING_BYTES):
            raise BusyError(
                f"{len(self._tasks)} pictures are waiting.",
                "Pictures arrive faster than they are judged.",
                "retry later, or send fewer at a time",
            )

    def submit(self, frame: NDArray[np.uint8], recipe: Recipe) -> Future[Judged]:
        """Have a frame judged.

        Args:
            frame: uint8 H x W x 3, RGB.
            recipe: by which.

        Raises:
            BusyError: too many wait, or it is closed.
        """
        future: Future[Judged] = Future()
        with self._changed:
            self._check(frame.nbytes)
            self._tasks.append(_Task(frame, recipe, future))
            self._bytes += frame.nbytes
            self._changed.notify_all()
        return future

    def close(self, timeout: float = 0.5) -> None:
        """End; what waits is refused. May be called twice."""
        with self._changed:
            self._closed = True
            tasks, self._tasks = list(self._tasks), deque()
            self._changed.notify_all()
        for task in tasks:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(BusyError("The service is stopping."))
        self._thread.join(timeout)

    def part_came(self) -> None:
        """Note that the line has a part: requests give way for some seconds."""
        self._line_seen = time.monotonic()

    @property
    def _line_is_active(self) -> bool:
        return time.monotonic() - self._line_seen < _ACTIVE

    def _run(self) -> None:
        give_way()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if self._closed:
                    return
            end = time.monotonic() + _YIELD
            while self._busy() and time.monotonic() < end:
                time.sleep(_STEP)
            tasks = self._taken(1 if self._line_is_active else self._most)
            began = time.monotonic()
            if tasks:
                _compute(tasks)
            if tasks and self._line_is_active:
                with self._changed:
                    rest = min(time.monotonic() - began, _LONGEST_TURN)
                    self._changed.wait_for(lambda: self._closed, rest)
            del tasks  # frames and maps must not stay until the next request

    def _taken(self, most: int) -> list[_Task]:
        """The first task, and those behind it with the same recipe, as many as go together."""
        taken: list[_Task] = []
        with self._changed:
            while self._tasks and len(taken) < most:
                if taken and self._tasks[0].recipe is not taken[0].recipe:
                    break
                task = self._tasks.popleft()
                self._bytes -= task.frame.nbytes
                if task.future.set_running_or_notify_cancel():
                    taken.append(task)
        return taken


def _compute(tasks: list[_Task]) -> None:
    recipe = tasks[0].recipe
    try:
        results = recipe.judge_many([task.frame for task in tasks])
    except Exception as error:
        if len(tasks) == 1:
            tasks[0].future.set_exception(error)
        else:
            for task in tasks:
                _compute([task])
        return
    for task, result in zip(tasks, results, strict=True):
        with suppress(Exception):  # a future that somebody has ended otherwise
            task.future.set_result(Judged(result, recipe, len(tasks)))
