"""The command `saae-train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saae_runtime.leave import start

__all__ = ["app", "main"]


def main() -> None:
    """Entry point. The command itself is imported late, when a Ctrl-C has somebody to take it."""

    def load() -> Callable[[], None]:
        from .command import main

        return main

    start(load)


def __getattr__(name: str) -> Any:
    # Late: `saae-export` takes its options of fitting from here, and needs none of the commands.
    if name == "app":
        from . import command

        return command.app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
