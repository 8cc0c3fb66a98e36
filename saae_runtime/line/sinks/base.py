"""What a sink is to the thread that feeds it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from ..spool_records import Record

__all__ = ["Hurry", "Sink"]

Hurry = threading.Event
"""Set when the service ends: what takes longer than a moment is left for the next start."""


class Sink(Protocol):
    """Takes records, in order. Used by one thread.

    Attributes:
        batch: so many records at most are given at once.
        refused: records that the other side will never take, such as those that a web server calls malformed.
    """

    batch: int
    refused: int

    def open(self) -> None:
        """Get ready; called again after an error of `write`, and may be called when it is ready.

        Raises:
            SaaeError: it cannot be reached, or written to.
        """

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Take records.

        Returns:
            How many of them, from the first on, are taken; the others are given again.

        Raises:
            SaaeError: none was taken; they are given again, later.
        """

    def sync(self) -> None:
        """Make what was taken survive a power cut.

        Raises:
            SaaeError: it cannot.
        """

    def state(self) -> dict[str, Any]:
        """What it says of itself, for health."""

    def close(self) -> None:
        """Let go. May be called twice."""
