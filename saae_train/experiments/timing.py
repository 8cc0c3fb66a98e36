"""Honest timing and peak memory: medians over many runs, compared things in turns, the process's high-water mark."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

__all__ = ["PeakMemory", "Timing", "measure", "measure_together", "stopwatch"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over `runs` timed calls."""

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


def measure(call: Callable[[], object], *, runs: int = 50, warmup: int = 5, max_seconds: float = 60.0) -> Timing:
    """Time one call; see `measure_together`."""
    return measure_together({"": call}, runs=runs, warmup=warmup, max_seconds=max_seconds)[""]


def measure_together(
    calls: Mapping[str, Callable[[], object]], *, runs: int = 50, warmup: int = 5, max_seconds: float = 60.0
) -> dict[str, Timing]:
    """Time several calls alternately: each round runs every call once, so load on the machine hits all alike.

    The first `warmup` rounds are not counted. Rounds end after `runs`, or after `max_seconds` with at least
    three counted. The garbage collector is off meanwhile. A call that starts work on a device must wait for it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            for call in calls.values():
                call()
        start = time.perf_counter()
        for done in range(max(runs, 1)):
            if done >= 3 and time.perf_counter() - start > max_seconds:
                break
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - before)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


class PeakMemory:
    """Largest resident memory of this process since the block began, in GiB (`.gib`, after the block).

    On Linux the kernel's high-water mark is reset at the start; where that is refused, `since_start` is True and
    the number covers the process's whole life.
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
    """Gives a function that returns the seconds since the block began (and, after it, its length)."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())
