"""The command `saae-export`."""

from __future__ import annotations

from saae_runtime.leave import start_command

__all__ = ["main"]


def main() -> None:
    """Entry point."""
    start_command(__name__)
