"""How fast each way to run a bundle is on this machine: timed once, kept, and found again."""

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
"""Seconds after which no further way is begun."""

_EACH = 0.5  # seconds of inference for each way
_WARM_UP = 0.1  # seconds before: a GPU's clocks rise, kernels and buffers are made
_FEWEST, _MOST = 3, 20  # runs
_HOPELESS = 2.0  # times the best so far: one run is enough to know
_WAIT = 60.0  # seconds to wait for other processes that are timing
_LIMIT = 1 << 20  # bytes of a file of figures
_known: dict[str, Figures] = {}  # of this process

Clock = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """One way to run the bundle.

    Attributes:
        backend, precision: what was timed.
        ms: the best time of one frame at the graph's size, host to host; None: it was not timed.
        why: why it was not.
        refused: whether its answers are wrong here, so that it must not be taken.
    """

    backend: str
    precision: str
    ms: float | None
    why: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Figures:
    """What was timed of one bundle on one machine.

    Attributes:
        rows: in the order in which they were timed.
        date: UTC, such as 2026-11-26.
        place: the file that holds them; None where they are this process's alone.
    """

    rows: tuple[Figure, ...]
    date: str
    place: Path | None = None

    def fastest(self) -> list[Figure]:
        """The rows that were timed, the fastest first."""
        return sorted((row for row in self.rows if row.ms is not None), key=lambda row: row.ms or 0.0)

    def refused(self, backend: str) -> str:
        """Why none of a backend's precisions may be taken here; empty where one may, or was not timed."""
        rows = [row for row in self.rows if row.backend == backend]
        return rows[0].why if rows and all(row.refused for row in rows) else ""

    def of(self, backend: str) -> list[Figure]:
        """The rows of a backend, the fastest first."""
        return [row for row in self.fastest() if row.backend == backend]


@dataclass(frozen=True)
class Way:
    """A backend at a precision, how to open it for a test of its speed, and what is wrong with its answers, if any."""

    backend: str
    precision: str
    open_it: Callable[[], Backend]
    wrong: Callable[[Backend], str] = lambda backend: ""


def find(key: Mapping[str, Any], folder: Path | None) -> Figures | None:
    """The figures for exactly this key, from this process or from a folder; None where there are none.

    Args:
        key: everything that speed depends on, plain JSON.
        folder: where `take` keeps figures, or None.
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
    """The figures for a key, timed now where they are not known; None where other processes are still timing theirs.

    Of several processes one times at a time, since two at once would time each other; those that wait for it find its
    figures where they are of the same bundle.

    Args:
        key: see `find`.
        folder: where to keep them; None: in this process alone.
        lock: a file that is held meanwhile, the same for all bundles of a user; None: none can be made.
        ways: what to time, the likely fastest first.
        say: told before it begins.
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
                found = keep(key, found, folder)  # before the lock is let go: who waits for it looks there
    return found if found is None else keep(key, found, folder)


def keep(key: Mapping[str, Any], figures: Figures, folder: Path | None) -> Figures:
    """Write figures into a folder, if they are not there; what cannot be written stays in this process."""
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
    """Time each way, one after another; one that fails says why, and none is begun when the time is up."""
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

    The best one, since what else runs on the machine makes a time longer, never shorter.
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
    # Figures of several machines and options lie side by side: a bundle may be on a disk that machines share.
    return folder / f"speed-{sha256_bytes(text.encode())[:16]}.json"


def _read(file: Path, key: Mapping[str, Any]) -> Figures | None:
    """The figures in a file; None where it is missing, damaged, or of another key."""
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
        raise ValueError("a time that is none")
    return float(value)
