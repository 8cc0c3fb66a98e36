"""Counts and latencies over months, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from .files import encodable

__all__ = ["PERCENTILES", "Meter", "Reading", "one_line"]

PERCENTILES = (50, 95, 99)

_REMEMBERED = 2000  # latencies kept for percentiles: more than a minute of a fast line
_SHORT = 300  # letters of an error


@dataclass(frozen=True)
class Reading:
    """Readings of a meter at one moment.

    Attributes:
        counts: by name, since the start.
        latency_ms: percentile -> milliseconds, of the latest 2000; empty before the first.
        last_error: text of the latest error, and its age in seconds; None without one.
        idle_seconds: seconds since the last activity.
    """

    counts: dict[str, int]
    latency_ms: dict[int, float]
    last_error: str | None
    error_age: float | None
    idle_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "counts": self.counts,
            "latency_ms": {f"p{rank}": value for rank, value in self.latency_ms.items()},
            "last_error": self.last_error,
            "error_age_seconds": self.error_age,
            "idle_seconds": self.idle_seconds,
        }


class Meter:
    """Counts, latencies and the latest error. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._error: tuple[str, float] | None = None
        self._moved = time.monotonic()

    def count(self, name: str, more: int = 1) -> None:
        """Count something; zero adds the name."""
        with self._lock:
            self._counts[name] += more

    def take(self, milliseconds: float) -> None:
        """Add one latency."""
        with self._lock:
            self._times.append(milliseconds)

    def fail(self, error: BaseException | str) -> None:
        """Keep the latest error."""
        with self._lock:
            self._error = (one_line(error), time.monotonic())

    def beat(self) -> None:
        """Record activity."""
        self._moved = time.monotonic()

    def read(self) -> Reading:
        """Current readings."""
        with self._lock:
            counts, times, error = dict(self._counts), np.asarray(self._times), self._error
        moment = time.monotonic()
        found = np.percentile(times, PERCENTILES) if times.size else ()
        return Reading(
            counts,
            {rank: round(float(value), 3) for rank, value in zip(PERCENTILES, found, strict=False)},
            error[0] if error else None,
            round(moment - error[1], 1) if error else None,
            round(moment - self._moved, 1),
        )


def one_line(error: BaseException | str, most: int = _SHORT) -> str:
    """An error as one line of text that UTF-8 can hold, whatever file it names."""
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    text = " ".join(encodable(text).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
