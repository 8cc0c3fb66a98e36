"""The process while a model is fitted: its arithmetic, its memory, and Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

__all__ = ["ctrl_c_after_the_step", "set_for_training"]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM, _DEFAULT_MMAPS = 128 * 1024, 65536


@contextmanager
def set_for_training() -> Iterator[None]:
    """Within the block, vanishing numbers count as zero, and freed memory is kept for the next step.

    Gradients that vanish otherwise slow the processor tenfold, and every large tensor costs the system a fresh page
    every 4 KiB, which took a fifth of a step.
    """
    flushed = torch.set_flush_denormal(True)
    library = _malloc()
    if library is not None:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(False)
        if library is not None:
            library.mallopt(_M_MMAP_MAX, _DEFAULT_MMAPS)
            library.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)
            library.malloc_trim(0)


def _malloc() -> ctypes.CDLL | None:
    """glibc, None where memory comes from elsewhere (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


@contextmanager
def ctrl_c_after_the_step() -> Iterator[Callable[[], bool]]:
    """Let the step in hand end before a Ctrl-C counts, so that a whole state can be saved; a second one stops at once.

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
