"""The command `saae-run`."""

from __future__ import annotations

from ..leave import leave, leave_at_once, open_closed_streams

__all__ = ["main"]


def main() -> None:
    """Entry point. The command itself is imported late, when a Ctrl-C has somebody to take it."""
    open_closed_streams()
    leave_at_once()
    from .command import main as run

    try:
        run()
    except SystemExit as stop:
        leave(stop.code)
