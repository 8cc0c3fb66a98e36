"""The command `saae-line`."""

from __future__ import annotations

from collections.abc import Callable

from ...leave import leave, open_closed_streams, start

__all__ = ["main"]


def main() -> None:
    """Entry point. The command itself is imported late, when a Ctrl-C has somebody to take it."""

    def load() -> Callable[[], None]:
        from .command import main

        return main

    open_closed_streams()
    try:
        start(load)
    except SystemExit as stop:
        leave(stop.code)
