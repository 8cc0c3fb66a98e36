"""The callback by which long work reports its progress."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "labelled", "nth", "silent"]


class Progress(Protocol):
    """Called often with (done, total), and with a text if several things are counted one after the other."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def labelled(progress: Progress, text: str) -> Progress:
    """Report the same numbers with this text."""
    return lambda done, total, more="": progress(done, total, text)


def nth(progress: Progress, number: int, parts: int) -> Progress:
    """Report for part `number` (from 0) of several parts of the same size."""
    return lambda done, total, text="": progress(number * total + done, parts * total, text)


def silent(done: int, total: int, text: str = "") -> None:
    """Report nothing."""
