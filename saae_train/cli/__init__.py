"""The command `saae-train`."""

from .command import app, main

__all__ = ["app", "main"]
