"""The command `saae-line`."""

from __future__ import annotations

from collections.abc import Callable

from ...leave import leave, open_closed_streams, start

__all__ = ["main"]


def main() -> None:
    """Entry point. Imports the command late, after Ctrl-C has its handler."""

    def load() -> Callable[[], None]:
        from .command import main

        return main

    open_closed_streams()
    try:
        start(load)
    except SystemExit as stop:
        leave(stop.code)
