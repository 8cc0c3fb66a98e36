"""The latest parts in memory: records for lists and charts, frames for pictures, counters for the shift."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as day_time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SaaeError
from ...files import read_regular, write_json
from ...result import Result
from ..part import Part, Verdict

__all__ = ["Recent", "Seen"]

_REGIONS = 10  # regions kept here with a record; the record itself has all of them
_LARGEST_COUNTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Seen:
    """A part with its frame.

    Attributes:
        number: number of the part since the service started, from 1.
        record: as `Part.to_dict`, with `number`.
        frame: uint8 H x W x 3.
        result: of the frame; None if it was not judged.
    """

    number: int
    record: dict[str, Any]
    frame: NDArray[np.uint8]
    result: Result | None

    @property
    def size(self) -> int:
        """Size in memory, bytes."""
        result = self.result
        return self.frame.nbytes + (0 if result is None else result.anomaly_map.nbytes + result.mask.nbytes)


class Recent:
    """Keeps the latest parts in bounded memory. Thread-safe.

    Half of the memory for frames is reserved for NG parts, so that good parts do not displace the bad ones that people
    want to see.

    Args:
        parts: number of records.
        frames_mb: memory for frames, in megabytes; the latest frame is always kept.
        shifts: when shifts begin, local time, in order.
        counts: file that keeps the counters of the shift over a restart; None: they are lost.
        clock: local time.
    """

    def __init__(
        self,
        parts: int,
        frames_mb: float,
        shifts: Sequence[day_time],
        counts: Path | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._lock = threading.Lock()
        self._records: deque[dict[str, Any]] = deque(maxlen=parts)
        self._frames: dict[Verdict, deque[Seen]] = {Verdict.OK: deque(), Verdict.NG: deque()}
        self._bytes = dict.fromkeys(self._frames, 0)
        self._most = frames_mb * 1e6 / 2
        self._numbers = itertools.count(1)
        self._shifts, self._file, self._clock = tuple(shifts), counts, clock
        self._shift = self._begin()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._saved: dict[str, Any] = {}
        self._watchers: list[Callable[[], None]] = []
        self._load()

    def take(self, part: Part, frame: NDArray[np.uint8] | None, result: Result | None) -> None:
        """Add a part; for `Line.listen`."""
        record = part.to_dict()
        record["regions"] = record["regions"][:_REGIONS]
        with self._lock:
            record["number"] = next(self._numbers)
            self._records.append(record)
            self._turn()
            self._counts[part.station, part.recipe or "", part.verdict.value] += 1
            if frame is not None:
                self._keep(part.verdict, Seen(record["number"], record, frame, result))
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher()

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call a function after each part, on the station's thread: it must not block. Return what ends it."""
        with self._lock:
            self._watchers.append(watcher)

        def end() -> None:
            with self._lock, suppress(ValueError):
                self._watchers.remove(watcher)

        return end

    def records(
        self,
        last: int,
        station: str | None = None,
        recipe: str | None = None,
        verdict: str | None = None,
        after: int = 0,
    ) -> list[dict[str, Any]]:
        """At most this many latest records that match, the latest first."""
        wanted = (("station", station), ("recipe", recipe), ("verdict", verdict))
        found: list[dict[str, Any]] = []
        with self._lock:
            for record in reversed(self._records):
                if len(found) >= last or record["number"] <= after:
                    break
                if all(value is None or record[key] == value for key, value in wanted):
                    found.append(record)
        return found

    def record(self, number: int) -> dict[str, Any] | None:
        """The record of a part; None if it is no longer in memory."""
        with self._lock:
            return next((item for item in reversed(self._records) if item["number"] == number), None)

    def by_key(self, key: str) -> dict[str, Any] | None:
        """The same, by the record's key."""
        with self._lock:
            return next((item for item in reversed(self._records) if item["key"] == key), None)

    def seen(self, number: int) -> Seen | None:
        """A part with its frame; None if it is no longer in memory."""
        with self._lock:
            return next((item for kept in self._frames.values() for item in kept if item.number == number), None)

    def with_frames(self) -> list[int]:
        """Numbers of the parts whose frames are in memory."""
        with self._lock:
            return sorted(item.number for kept in self._frames.values() for item in kept)

    @property
    def latest(self) -> int:
        """Number of the latest part; 0 before the first."""
        with self._lock:
            return int(self._records[-1]["number"]) if self._records else 0

    def counters(self) -> dict[str, Any]:
        """Number of parts of this shift by station, recipe and verdict, and its begin (local time)."""
        with self._lock:
            self._turn()
            rows: dict[tuple[str, str], dict[str, Any]] = {}
            for (station, recipe, verdict), count in self._counts.items():
                row = rows.setdefault((station, recipe), {"station": station, "recipe": recipe, "OK": 0, "NG": 0})
                row[verdict] = count
            return {"since": self._shift.isoformat(timespec="minutes"), "rows": [rows[key] for key in sorted(rows)]}

    def save(self) -> None:
        """Save the counters if they have changed; ignore a full disk."""
        with self._lock:
            rows = [[*key, count] for key, count in self._counts.items()]
            data = {"shift": self._shift.isoformat(), "counts": rows}
        if self._file is None or data == self._saved:
            return
        with suppress(SaaeError, OSError):
            write_json(self._file, data)
            self._saved = data

    # --- inside, with the lock held ---

    def _keep(self, verdict: Verdict, seen: Seen) -> None:
        kept = self._frames[verdict]
        kept.append(seen)
        self._bytes[verdict] += seen.size
        while len(kept) > 1 and (self._bytes[verdict] > self._most or len(kept) > (self._records.maxlen or 0)):
            self._bytes[verdict] -= kept.popleft().size

    def _begin(self) -> datetime:
        """Begin of the current shift."""
        moment = self._clock()
        starts = [datetime.combine(moment.date() - timedelta(days=back), at) for back in (1, 0) for at in self._shifts]
        return max(start for start in starts if start <= moment)

    def _turn(self) -> None:
        begin = self._begin()
        if begin != self._shift:
            self._shift = begin
            self._counts.clear()

    def _load(self) -> None:
        if self._file is None:
            return
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(read_regular(self._file, _LARGEST_COUNTS))
            if data["shift"] != self._shift.isoformat():
                return
            for station, recipe, verdict, count in data["counts"]:
                if type(count) is int and verdict in ("OK", "NG"):
                    self._counts[str(station), str(recipe), verdict] = count
