"""The end of a process waits for native calls under way, so that it ends with its own exit code."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["native_call"]

_LONGEST = 60.0  # seconds that the end of the process waits for calls under way

_changed = threading.Condition()
_running = 0
_ending = False


@contextmanager
def native_call() -> Iterator[None]:
    """Around code that runs inside an inference library.

    At its end Python stops daemon threads where they next need the interpreter. In the middle of C++ that ends the
    whole process with `terminate called` and exit code 134. So the end waits for calls under way, and a daemon thread
    that would begin one by then sleeps until the process is gone.
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
