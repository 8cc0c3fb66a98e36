"""Times calls, alone or several interleaved, and measures the peak memory of the process."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

__all__ = ["PeakMemory", "Timing", "Turn", "interleaved", "stopwatch", "timed_calls"]

Turn = Callable[[float], list[float]]
"""Works for about the given seconds and returns the timed seconds, at least one value."""

Key = TypeVar("Key", bound=Hashable)

PAUSE = 0.03
"""Seconds before each turn of `interleaved`."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, over `runs` timed calls."""

    runs: int
    median_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ms = np.asarray(seconds, dtype=np.float64) * 1000.0
        if ms.size == 0:
            raise ValueError("no timed run")
        median, p95, p99 = np.percentile(ms, [50, 95, 99])
        return cls(ms.size, float(median), float(p95), float(p99), float(ms.min()), float(ms.mean()))

    @property
    def per_second(self) -> float:
        return 1000.0 / self.median_ms if self.median_ms > 0 else float("inf")

    def to_json(self) -> dict[str, float]:
        return {k: (v if isinstance(v, int) else round(v, 4)) for k, v in asdict(self).items()}


def timed_calls(
    call: Callable[[], object], seconds: float, *, warm_up: int = 1, fewest: int = 2, most: int | None = None
) -> list[float]:
    """Time single calls for about `seconds`. A call that starts work on a device must wait for it.

    Args:
        call: what is timed.
        seconds: no further call starts after this time, except to reach `fewest`.
        warm_up: calls before the timed ones, not counted.
        fewest, most: bounds on the number of timed calls; `most` None: no bound.

    Returns:
        Seconds of each call.
    """
    for _ in range(warm_up):
        call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < fewest or time.perf_counter() < end:
        if most is not None and len(found) >= most:
            break
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def interleaved(
    turns: Mapping[Key, Turn],
    seconds: float,
    length: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Key, list[float]]:
    """Time several things in short turns, round after round, so that a drifting machine slows all of them equally.

    A pause before each turn lets the thread pool of the previous turn go to sleep. An entry whose turns take too long
    skips rounds, so that it ends with the others. The garbage collector is off during the turns.

    Args:
        turns: name -> turn, for example `partial(timed_calls, call)`.
        seconds: total for each entry.
        length: seconds of one turn, at most a quarter of `seconds`.
        progress: called with (done, total) turns.

    Returns:
        name -> timed seconds of all its turns.
    """
    length = min(length, seconds / 4)
    rounds = round(seconds / length)
    found: dict[Key, list[float]] = {name: [] for name in turns}
    used = dict.fromkeys(turns, 0.0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for place, (name, turn) in enumerate(turns.items()):
                if progress is not None:
                    progress(number * len(turns) + place, rounds * len(turns))
                if used[name] > 1.5 * seconds * number / rounds:  # a turn also makes calls that are not counted
                    continue
                time.sleep(PAUSE)
                start = time.perf_counter()
                found[name] += turn(length)
                used[name] += time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return found


class PeakMemory:
    """Context manager that measures the largest resident memory of this process inside its block.

    On Linux the kernel's high-water mark is reset at the start.

    Attributes:
        gib: the peak in GiB, set after the block.
        since_start: True if the mark could not be reset; the peak then covers the whole life of the process.
    """

    def __init__(self) -> None:
        self.gib = 0.0
        self.since_start = False

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.since_start = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.gib = _high_water_kib() / 2**20


def _high_water_kib() -> float:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else float(peak)


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the block began; after the block, its length."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())
