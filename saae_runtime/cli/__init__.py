"""The command `saae-run`."""

from .command import app, main

__all__ = ["app", "main"]
