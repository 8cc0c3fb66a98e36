"""Whether a station can judge: its camera is connected, its engine works, and nothing else has failed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import FrameError
from ..meter import one_line
from .camera import Camera
from .recipes import Recipe

__all__ = ["Trouble"]

_STUCK = 5.0  # seconds that a verdict may be overdue
_FAILURES = 3  # consecutive parts at which an engine fails
_PROBE = (1.0, 30.0)  # seconds between two attempts of a failing engine: first, longest


class Trouble:
    """Why a station cannot judge now; empty: it can.

    Args:
        camera: the station's camera.
        overdue: seconds by which the current verdict is overdue.
        elsewhere: what else has failed, such as the archive; empty for nothing.
    """

    def __init__(self, camera: Camera, overdue: Callable[[], float], elsewhere: Callable[[], str]) -> None:
        self._camera, self._overdue, self._elsewhere = camera, overdue, elsewhere
        self._failed: tuple[Recipe, NDArray[np.uint8]] | None = None
        self._failures = 0
        self._why = ""
        self._pause, self._due = _PROBE[0], 0.0
        self._out_of_frames = False

    def look(self) -> str:
        """The current reason."""
        stats = self._camera.stats
        if not stats.connected:
            return f"the camera is disconnected: {stats.last_error or 'no reason given'}"
        if self._out_of_frames:
            return "the camera has no more frames"
        if self._overdue() > _STUCK:
            return "a verdict has been overdue for more than 5 seconds"
        if self._failures >= _FAILURES:
            return f"the engine fails: {self._why}"
        return self._elsewhere()

    def judged(self) -> None:
        """Note that the engine gave a result."""
        self._failures, self._failed = 0, None

    def failed(self, recipe: Recipe, frame: NDArray[np.uint8], error: BaseException) -> None:
        """Note that the engine failed. A frame that does not fit a recipe does not count."""
        if isinstance(error, FrameError):
            return
        self._failures += 1
        self._why = one_line(error)
        if self._failures == _FAILURES:
            self._pause, self._due = _PROBE[0], time.monotonic() + _PROBE[0]
        self._failed = (recipe, frame)

    def ran_out(self) -> None:
        """Note that the camera has no more frames."""
        self._out_of_frames = True

    def probe(self, current: Callable[[str], Recipe], judge: Callable[[Recipe, NDArray[np.uint8]], object]) -> None:
        """Try a failing engine again on the frame that it failed at, after growing pauses.

        Args:
            current: returns the current recipe of a name; a changed one may have another engine.
            judge: computes a result, or raises.
        """
        if self._failed is None or self._failures < _FAILURES or time.monotonic() < self._due:
            return
        recipe, frame = self._failed
        try:
            judge(current(recipe.name), frame)
        except BaseException as error:
            self._why = one_line(error)
            self._pause = min(2 * self._pause, _PROBE[1])
            self._due = time.monotonic() + self._pause
        else:
            self.judged()
