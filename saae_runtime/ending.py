"""Makes the end of a process wait for running native calls, so that it keeps its exit code."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["native_call"]

_LONGEST = 60.0  # seconds that the end of the process waits for running calls

_changed = threading.Condition()
_running = 0
_ending = False


@contextmanager
def native_call() -> Iterator[None]:
    """A block that runs inside an inference library.

    At its end Python stops daemon threads when they next need the interpreter. Inside C++ this aborts the process with
    `terminate called` and exit code 134. So the end waits for running calls, and a daemon thread that would start
    another one sleeps until the process has ended.
    """
    global _running
    with _changed:
        if _ending and threading.current_thread().daemon:
            _changed.wait_for(lambda: False)
        _running += 1
    try:
        yield
    finally:
        with _changed:
            _running -= 1
            _changed.notify_all()


def _wait() -> None:
    global _ending
    with _changed:
        _ending = True
        _changed.wait_for(lambda: _running == 0, _LONGEST)


atexit.register(_wait)
