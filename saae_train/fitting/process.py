"""Settings of the process during a fit: denormals, freed memory, and Ctrl-C only between steps."""

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
    """Within the block, denormal numbers are zero, and freed memory is kept for the next step.

    Otherwise vanishing gradients slow the processor tenfold, and page faults of new large tensors take a fifth of a
    step.
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
    """glibc; None with another C library (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


@contextmanager
def ctrl_c_after_the_step() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C until the current step has ended, so that its state can be saved. A second one stops at once.

    Yields a function that tells whether to stop.
    """
    before = signal.getsignal(signal.SIGINT)
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    # Outside the main thread, or if Ctrl-C is ignored or handled already, nothing changes.
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
