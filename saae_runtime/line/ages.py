"""The clock for what is removed by its age: a system clock that is wrong for a while must not remove everything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["Ages"]

_FASTEST = 10.0  # seconds that ages grow by for each second of running, at most


class Ages:
    """Follows the system's clock, at most ten times as fast as the service has been running.

    So ages are right while the clock is right and the service runs for more than two hours a day. A clock that is 100
    days ahead for an hour adds ten hours to them. After a pause, they catch up in a tenth of the pause.

    Args:
        newest: when the newest of the things was stored, seconds since 1970: where to begin without a memory. None:
            there is nothing yet.
        memory: a file whose time keeps the clock over restarts; None: it is not kept.
        clock: the system's clock, seconds since 1970.
        running: seconds that only go forward.
    """

    def __init__(
        self,
        newest: float | None,
        memory: Path | None = None,
        clock: Callable[[], float] = time.time,
        running: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._clock, self._running = memory, clock, running
        self._moment = running()
        self._seen = clock() if newest is None else newest
        if memory is not None:
            with suppress(OSError):
                self._seen = memory.stat().st_mtime

    def now(self) -> float:
        """The time to count ages to, seconds since 1970; never ahead of the clock."""
        wall, moment = self._clock(), self._running()
        step = _FASTEST * (moment - self._moment)
        self._moment = moment
        self._seen += min(max(wall - self._seen, -step), step)
        if self._memory is not None:
            with suppress(OSError):  # a full disk: the next time is soon enough
                self._memory.touch()
                os.utime(self._memory, (self._seen, self._seen))
        return min(wall, self._seen)

    def stamp(self) -> float:
        """The time to store a new thing with, seconds since 1970: a clock that is behind would make it old at once."""
        return max(self._clock(), self._seen)
