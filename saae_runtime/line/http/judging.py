"""Judges images of requests, in batches if several wait, and after the parts of the line."""

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

_YIELD = 0.25  # longest wait of a batch for the parts of the line, in seconds
_ACTIVE = 5.0  # seconds after a part of the line in which batches are single images, with pauses
_LONGEST_TURN = 0.5  # longest pause for the line after a batch, in seconds
_STEP = 0.002
_WAITING_BYTES = 512 << 20  # of waiting frames


class BusyError(DeviceError):
    """Too many images wait already; one more would only delay all of them."""


@dataclass(frozen=True, eq=False)
class Judged:
    """An image's result, its recipe, and how many images were computed together."""

    result: Result
    recipe: Recipe
    together: int


@dataclass(frozen=True, eq=False)
class _Task:
    frame: NDArray[np.uint8]
    recipe: Recipe
    future: Future[Judged]


class Batcher:
    """Computes waiting images in order, on one thread; images that arrive meanwhile form the next batch.

    Images of the same recipe are one call of the engine. Cancelled tasks are skipped. If one image of a batch cannot
    be judged, all are computed again one by one.

    The line goes first. While its stations have parts, a batch is one image, so that a part waits for at most one
    computation; after each batch the thread pauses as long as it computed; and it has a lower priority.

    Args:
        most: images in one call.
        waiting: images that may wait.
        busy: whether the line computes a verdict; then requests wait, at most a quarter of a second.
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
        """Refuse early, before a body is read and decoded.

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
                f"{len(self._tasks)} images are waiting.",
                "Images arrive faster than they are judged.",
                "retry later, or send fewer at a time",
            )

    def submit(self, frame: NDArray[np.uint8], recipe: Recipe) -> Future[Judged]:
        """Queue a frame.

        Args:
            frame: uint8 H x W x 3, RGB.
            recipe: the recipe to judge by.

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
        """End; refuse waiting tasks. May be called twice."""
        with self._changed:
            self._closed = True
            tasks, self._tasks = list(self._tasks), deque()
            self._changed.notify_all()
        for task in tasks:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(BusyError("The service is stopping."))
        self._thread.join(timeout)

    def part_came(self) -> None:
        """Note that the line has a part: requests yield for some seconds."""
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
            del tasks  # free frames and maps before the next request

    def _taken(self, most: int) -> list[_Task]:
        """The first task, and the next ones with the same recipe, up to a batch."""
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
        with suppress(Exception):  # a future that has ended otherwise
            task.future.set_result(Judged(result, recipe, len(tasks)))
