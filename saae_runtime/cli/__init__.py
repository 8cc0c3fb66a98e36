"""The command `saae-run`."""

from __future__ import annotations

from ..leave import leave, leave_at_once, open_closed_streams

__all__ = ["main"]


def main() -> None:
    """Entry point. Imports the command late, after Ctrl-C has its handler."""
    open_closed_streams()
    leave_at_once()
    from .command import main as run

    try:
        run()
    except SystemExit as stop:
        leave(stop.code)
