"""Notifies systemd (ready, alive, stopping), one datagram each; without systemd nothing happens."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

__all__ = ["notify", "watchdog_seconds"]


def notify(state: str) -> bool:
    """Send a state such as `READY=1`, `WATCHDOG=1` or `STATUS=...` to the service manager.

    Returns:
        Whether it was sent; False without a service manager.
    """
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place or place[0] not in "/@" or not hasattr(socket, "AF_UNIX"):
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(1.0)
        sender.connect("\0" + place[1:] if place[0] == "@" else place)
        sender.sendall(state.encode("utf-8"))
        return True
    return False


def watchdog_seconds() -> float | None:
    """Longest interval between two `WATCHDOG=1`, in seconds; None: no watchdog for this process."""
    try:
        wanted = int(os.environ.get("WATCHDOG_USEC", "0"))
        process = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return wanted / 1e6 if wanted > 0 and process == os.getpid() else None
