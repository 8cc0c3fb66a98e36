"""How a command starts and ends: stopped at any moment, it says so and exits with its own code."""

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

    While threads still compute (a library that cannot be stopped), the interpreter's own shutdown is skipped: a thread
    that returns from C++ into an interpreter that is shutting down aborts the process, with code 134.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if threading.active_count() > 1:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    sys.exit(code if isinstance(code, int) or code is None else 1)


def leave_at_once() -> None:
    """Have Ctrl-C and SIGTERM end the process at once, with one word, from now on.

    For start-up: an exception would be raised inside an import, where libraries take it for a fault of their own.
    Nothing is half-written then. While frames are scored, the run has handlers of its own.
    """

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _break_off)


def start(load: Callable[[], Callable[[], None]]) -> None:
    """Load a command, which Ctrl-C and SIGTERM end at once meanwhile, and run it with the earlier handlers.

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
    """Import `PACKAGE.command` late, when a Ctrl-C can be handled, and run its `main`."""
    start(lambda: import_module(f"{package}.command").main)


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Have the first Ctrl-C or SIGTERM within the block set `stop`, so that work ends in order.

    A second one ends the process at once, whatever it does. Only the main thread sets handlers: in a program that
    embeds saae on another one, signals are the program's.

    Args:
        stop: to look at, without waiting for it: the handler sets it on the main thread itself.

    Returns:
        The signals that came: none, or one.
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
    """Open the null device for a standard stream that is closed (`>&-`): the next file would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
