"""Start and end of a command: when stopped, it says so and exits with its own code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType

__all__ = ["leave", "leave_at_once", "open_closed_streams", "start", "start_command", "stopped_by_signals"]


def leave(code: object) -> None:
    """End the process with this code, as `sys.exit` takes it.

    If threads still compute in a library, the interpreter's shutdown is skipped: a thread that returns from C++ during
    the shutdown would abort the process with code 134.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if threading.active_count() > 1:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    sys.exit(code if isinstance(code, int) or code is None else 1)


def leave_at_once() -> None:
    """Make Ctrl-C and SIGTERM end the process at once with a short message.

    For start-up, when nothing is half-written: an exception inside an import would be misunderstood by libraries. The
    run has its own handlers while frames are scored.
    """

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _break_off)


def start(load: Callable[[], Callable[[], None]]) -> None:
    """Load a command, during which Ctrl-C and SIGTERM end at once, and run it with the earlier handlers.

    Args:
        load: imports the command and returns it.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    leave_at_once()
    run = load()
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)
    run()


def start_command(package: str) -> None:
    """Import `PACKAGE.command` after Ctrl-C has its handler, and run its `main`."""
    start(lambda: import_module(f"{package}.command").main)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Within the block, the first Ctrl-C or SIGTERM sets `stop`, so that work ends cleanly.

    A second one ends the process at once. Only the main thread sets handlers; a host program that runs saae on another
    thread handles signals itself.

    Args:
        stop: poll it without waiting, because the handler sets it on the main thread.

    Returns:
        List of the received signals: none or one.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            _break_off(number, frame)
        received.append(number)
        stop.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _break_off(number: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"Stopped.\n")
    os._exit(128 + number)


def open_closed_streams() -> None:
    """Open the null device for a closed standard stream (`>&-`), because the next file would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
