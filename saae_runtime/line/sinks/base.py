"""The interface of a sink."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from ..spool_records import Record

__all__ = ["Hurry", "Sink"]

Hurry = threading.Event
"""Set when the service ends: slow work is then left for the next start."""


class Sink(Protocol):
    """Takes records, in order. Used by one thread.

    Attributes:
        batch: largest number of records given at once.
        refused: number of records that the other side will never take, such as malformed ones.
        refusal: why the latest of them was not taken; empty if none was refused.
    """

    batch: int
    refused: int
    refusal: str

    def open(self) -> None:
        """Open the sink. Called again after an error of `write`; may be called when it is open.

        Raises:
            SaaeError: it cannot be reached or written to.
        """

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Take records.

        Returns:
            Number of records taken, from the first on; the others are given again.

        Raises:
            SaaeError: none was taken; they are given again, later.
        """

    def sync(self) -> None:
        """Make taken records survive a power cut.

        Raises:
            SaaeError: not possible.
        """

    def state(self) -> dict[str, Any]:
        """Details for health."""

    def close(self) -> None:
        """Close the sink. May be called twice."""
