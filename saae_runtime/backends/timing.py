"""Times each backend and precision of a bundle on this machine once, and keeps the timings."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, StorageError
from ..files import canonical_json, read_regular, sha256_bytes, write_json
from ..locks import turn
from .base import Backend

__all__ = ["BUDGET", "Figure", "Figures", "find", "keep", "take", "time_ways"]

BUDGET = 10.0
"""Seconds after which no further timing is started."""

_EACH = 0.5  # seconds of inference for each
_WARM_UP = 0.1  # seconds of warm-up: clocks of a GPU rise, kernels and buffers are made
_FEWEST, _MOST = 3, 20  # runs
_HOPELESS = 2.0  # times the best so far: then one run is enough
_WAIT = 60.0  # seconds to wait for other processes that are timing
_LIMIT = 1 << 20  # bytes of a file of timings
_known: dict[str, Figures] = {}  # of this process

Clock = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """Timing of a backend at a precision.

    Attributes:
        backend, precision: what was timed.
        ms: the best time of one frame at the graph's size, host to host; None: not timed.
        why: why it was not timed.
        refused: whether its answers are wrong here; then it must not be taken.
    """

    backend: str
    precision: str
    ms: float | None
    why: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Figures:
    """Timings of one bundle on one machine.

    Attributes:
        rows: in the order in which they were timed.
        date: UTC, such as 2026-11-26.
        place: the file that holds them; None if only this process has them.
    """

    rows: tuple[Figure, ...]
    date: str
    place: Path | None = None

    def fastest(self) -> list[Figure]:
        """The rows that were timed, the fastest first."""
        return sorted((row for row in self.rows if row.ms is not None), key=lambda row: row.ms or 0.0)

    def refused(self, backend: str) -> str:
        """Why none of a backend's precisions may be taken here; empty if one may be, or if none was timed."""
        rows = [row for row in self.rows if row.backend == backend]
        return rows[0].why if rows and all(row.refused for row in rows) else ""

    def of(self, backend: str) -> list[Figure]:
        """The rows of a backend, the fastest first."""
        return [row for row in self.fastest() if row.backend == backend]


@dataclass(frozen=True)
class Way:
    """A backend at a precision, how to open it for timing, and a check that says what is wrong with its answers."""

    backend: str
    precision: str
    open_it: Callable[[], Backend]
    wrong: Callable[[Backend], str] = lambda backend: ""


def find(key: Mapping[str, Any], folder: Path | None) -> Figures | None:
    """The timings for exactly this key, from this process or from a folder; None without any.

    Args:
        key: everything that speed depends on, as JSON values.
        folder: where `take` keeps timings, or None.
    """
    text = canonical_json(key)
    known = _known.get(text)
    if known is None and folder is not None and (known := _read(_file(folder, text), key)) is not None:
        _known[text] = known
    return known


def take(
    key: Mapping[str, Any],
    folder: Path | None,
    lock: Path | None,
    ways: Sequence[Way],
    say: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> Figures | None:
    """The timings for a key, measured now if unknown; None if other processes are still timing.

    Only one process times at once, because two would disturb each other. Waiting processes use its timings if they have
    the same bundle.

    Args:
        key: see `find`.
        folder: where to keep them; None: only in this process.
        lock: a lock file for all bundles of a user; None: not possible.
        ways: what to time, the probably fastest first.
        say: called before it starts.
        clock: seconds.
    """
    found = find(key, folder)
    if found is None:
        with turn(lock, _WAIT) as mine:
            found = find(key, folder)
            if found is None and mine:
                say(f"timing {len(ways)} ways to run this bundle, once on this machine: up to {BUDGET:.0f} s")
                found = Figures(time_ways(ways, clock), datetime.now(timezone.utc).date().isoformat())
                _known[canonical_json(key)] = found
                for row in found.rows:
                    if row.refused:
                        say(f"{row.backend} {row.precision} is passed over: {row.why}")
                found = keep(key, found, folder)  # before the lock is released, for waiting processes
    return found if found is None else keep(key, found, folder)


def keep(key: Mapping[str, Any], figures: Figures, folder: Path | None) -> Figures:
    """Write timings into a folder, if they are missing there; if that fails, they stay in this process."""
    text = canonical_json(key)
    if folder is None or figures.place is not None:
        return figures
    file = _file(folder, text)
    rows = [dataclasses.asdict(row) for row in figures.rows]
    try:
        write_json(file, {"key": key, "date": figures.date, "rows": rows})
    except StorageError:
        return figures
    _known[text] = Figures(figures.rows, figures.date, file)
    return _known[text]


def time_ways(ways: Sequence[Way], clock: Clock = time.perf_counter) -> tuple[Figure, ...]:
    """Time each one after another; record why one fails; start none after the time limit."""
    rows: list[Figure] = []
    best = math.inf
    end = clock() + BUDGET
    for way in ways:
        if rows and clock() >= end:
            rows.append(Figure(way.backend, way.precision, None, "no time was left"))
            continue
        try:
            seconds, wrong = _timed(way, best, clock)
        except BackendError as error:
            rows.append(Figure(way.backend, way.precision, None, f"{error.what} {error.why}".strip()))
            continue
        if wrong:
            rows.append(Figure(way.backend, way.precision, None, wrong, refused=True))
            continue
        best = min(best, seconds)
        rows.append(Figure(way.backend, way.precision, round(1000 * seconds, 3)))
    return tuple(rows)


def _timed(way: Way, best: float, clock: Clock) -> tuple[float, str]:
    """The best time of a frame in seconds, and what is wrong with the answers.

    The best one, because other work on the machine only makes times longer.
    """
    backend = way.open_it()
    try:
        if wrong := way.wrong(backend):
            return math.inf, wrong
        frames = np.random.default_rng(0).integers(0, 256, (1, *backend.frame_size, 3), np.uint8)
        begun = clock()
        times = [_run(backend, frames, clock)]
        if times[0] * backend.slots < _WARM_UP:
            while clock() - begun < _WARM_UP:
                _run(backend, frames, clock)
            times.clear()
            begun = clock()
        while len(times) < _FEWEST or (len(times) < _MOST and clock() - begun < _EACH):
            if times and times[-1] > _HOPELESS * best:
                break
            times.append(_run(backend, frames, clock))
        return min(times), ""
    finally:
        backend.close()


def _run(backend: Backend, frames: NDArray[np.uint8], clock: Clock) -> float:
    """Seconds a frame, with as many batches as the backend likes to have in flight; on a CPU with the latency hint."""
    limit = float(np.finfo(np.float32).max)
    start = clock()
    tickets = [backend.submit(frames, limit) for _ in range(backend.slots)]
    for ticket in tickets:
        backend.collect(ticket)
    return (clock() - start) / backend.slots


def _file(folder: Path, text: str) -> Path:
    # One file per machine and options, because a bundle may be on a shared disk.
    return folder / f"speed-{sha256_bytes(text.encode())[:16]}.json"


def _read(file: Path, key: Mapping[str, Any]) -> Figures | None:
    """The timings in a file; None if it is missing, damaged, or of a different key."""
    try:
        data: Any = json.loads(read_regular(file, _LIMIT))
        if data["key"] != json.loads(canonical_json(key)):
            return None
        rows = tuple(
            Figure(str(row["backend"]), str(row["precision"]), _ms(row["ms"]), str(row["why"]), row["refused"] is True)
            for row in data["rows"]
        )
        return Figures(rows, str(data["date"])[:10], file) if rows else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _ms(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("not a time")
    return float(value)
