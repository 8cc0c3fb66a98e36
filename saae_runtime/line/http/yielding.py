"""Lowers the priority of the HTTP service's threads, if the system allows it."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

__all__ = ["give_way"]

_NICE = 10
_given = threading.local()


def give_way() -> None:
    """Lower the priority of this thread. Only Linux has a priority per thread; elsewhere nothing happens."""
    if sys.platform == "linux" and not getattr(_given, "way", False):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        _given.way = True
