"""File locks between processes; the system releases them however a process ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError
from .files import storage_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "turn"]

_PAUSE = 0.05  # seconds between two attempts


@contextmanager
def alone(lock: Path, what: str, cure: str) -> Iterator[None]:
    """Refuse to enter a block that another process is in.

    Without support for locks (Windows, some network shares) nothing is refused.

    Args:
        lock: an empty file, created if missing, and kept.
        what: what the block does, for the error in another process.
        cure: advice for the other process.

    Raises:
        ConfigError: another process holds the lock.
        StorageError: the place may not be written to.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("wb")
    except OSError as error:
        raise storage_error(lock, error) from error
    with handle:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{what} is already running.", f"It holds {lock}; both would write the same files.", cure
            ) from None
        except OSError:
            pass
        yield


@contextmanager
def turn(lock: Path | None, seconds: float) -> Iterator[bool]:
    """Wait until no other process or thread is in a block with the same lock; yield False if that took too long.

    Without support for locks (Windows, some network shares, a read-only place) there is no wait.

    Args:
        lock: an empty file, created if missing, and kept; None: no lock.
        seconds: the longest wait.
    """
    handle = -1
    try:
        if lock is not None and fcntl is not None:
            with suppress(OSError):
                lock.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        yield handle < 0 or _locked(handle, seconds)
    finally:
        if handle >= 0:
            os.close(handle)


def _locked(handle: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_PAUSE)
        except OSError:
            return True
