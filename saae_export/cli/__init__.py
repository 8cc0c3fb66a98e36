"""The command `saae-export`."""

from .command import app, main

__all__ = ["app", "main"]
