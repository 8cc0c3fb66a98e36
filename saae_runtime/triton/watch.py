"""Notices that a server serves another model than the one whose thresholds an engine has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BackendError

__all__ = ["Watch"]

_PERIOD = 3.0  # seconds between two questions to a server that answers


class Watch:
    """Compares what the server says of its model with what it said first. Thread-safe.

    Args:
        first: the parameter `saae` when the engine was opened.
        ask: asks the server for it again.
        known: sends the known frame; raises if its score is another.
        name: of the model and its server, for messages.
    """

    def __init__(
        self, first: Mapping[str, Any], ask: Callable[[], Mapping[str, Any]], known: Callable[[], None], name: str
    ) -> None:
        self._first, self._ask, self._known, self._name = first, ask, known, name
        self._doubted = False
        self._next = time.monotonic() + _PERIOD
        self._lock = threading.Lock()

    def doubt(self) -> None:
        """A request failed: the server may come back with another model."""
        self._doubted = True

    def check(self) -> None:
        """Called after an answer and before it is used; asks the server after a doubt, and every few seconds.

        Raises:
            BackendError: another model is served, or it gives another score for the known frame.
            BackendUnavailableError: the server does not answer.
        """
        if not self._due():
            return
        with self._lock:
            if not self._due():  # another thread has asked meanwhile
                return
            doubted, self._doubted = self._doubted, False
            try:
                if self._ask() != self._first:
                    raise BackendError(
                        f"Another model is served: {self._name}.",
                        "Its thresholds or its known score are not those that this engine was opened with.",
                        "open a new engine",
                    )
                if doubted:
                    self._known()
            except BaseException:
                self._doubted = True
                raise
            self._next = time.monotonic() + _PERIOD

    def _due(self) -> bool:
        return self._doubted or time.monotonic() >= self._next
