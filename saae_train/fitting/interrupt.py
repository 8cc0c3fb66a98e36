"""Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ctrl_c_after_the_step"]


@contextmanager
def ctrl_c_after_the_step() -> Iterator[Callable[[], bool]]:
    """Lets the step in hand end before a Ctrl-C counts, so that a whole state can be saved; a second one stops at once.

    Gives a function that says whether to stop.
    """
    before = signal.getsignal(signal.SIGINT)
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    # Elsewhere than in the main thread, or where Ctrl-C is ignored or handled already, it stays as it is.
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
