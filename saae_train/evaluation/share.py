"""A share of independent images or defects, with its Wilson interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """`found` of `count`, with the 95 % Wilson interval."""

    found: int
    count: int

    @property
    def value(self) -> float | None:
        return self.found / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's score interval at 95 %; None if `count` is 0."""
        n = self.count
        if not n:
            return None
        z = 1.959964
        p = self.found / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # At the ends the exact bounds are 0 and 1; rounding must not miss them.
        return 0.0 if self.found == 0 else middle - half, 1.0 if self.found == n else middle + half

    def __str__(self) -> str:
        return f"{self.found} of {self.count}"

    def to_json(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "found": self.found,
            "count": self.count,
            "value": self.value,
            "interval": None if interval is None else list(interval),
        }
