"""Time per frame of a bundle's backends on this machine, frame to result."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saae_runtime import backends
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError
from saae_train.experiments.timing import Timing, timed_calls

from ..report.data import LatencyRow

__all__ = ["INSIDE", "machine", "measure"]

INSIDE = "frame to result: host resize where needed, inference, map and mask at the frame's size"

_WARM_UP, _FEWEST = 3, 5


def measure(
    bundle: Bundle,
    frames: Sequence[NDArray[np.uint8]],
    runs: int = 30,
    seconds: float = 8.0,
    skipped: Callable[[str], None] = lambda text: None,
) -> Iterator[LatencyRow]:
    """Time every backend that works here and that `auto` considers, at every precision, one frame at a time.

    Args:
        bundle: an opened bundle.
        frames: uint8 H x W x 3, used in turn.
        runs: calls per backend, after three that are not counted.
        seconds: time limit per backend (at least five calls are made).
        skipped: called with name, precision and reason of a backend that fails to open.
    """
    for precision in bundle.manifest.precisions():
        for candidate in backends.candidates(bundle, 0, precision):
            artefact = candidate.artefact
            if candidate.name not in backends.AUTO_ORDER or candidate.why_not is not None:
                continue
            if artefact is None or artefact.precision != precision:
                continue
            try:
                with Engine(bundle, backend=candidate.name, precision=precision, verify=False, cache=False) as engine:
                    timing = _timing(engine, frames, runs, seconds)
            except BackendError as error:  # a provider's libraries are only loaded when it is opened
                skipped(f"{candidate.name} {precision}: {error.what} {error.why}".strip())
                continue
            yield LatencyRow(
                backend=candidate.name,
                precision=precision,
                median_ms=timing.median_ms,
                p95_ms=timing.p95_ms,
                inside=INSIDE,
                runs=timing.runs,
                where=machine(),
            )


def machine() -> str:
    """The processor, and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'' if cores == 1 else 's'}"


def _timing(engine: Engine, frames: Sequence[NDArray[np.uint8]], runs: int, seconds: float) -> Timing:
    shown = cycle(frames)
    fewest = min(runs, _FEWEST)
    times = timed_calls(lambda: engine(next(shown)), seconds, warm_up=_WARM_UP, fewest=fewest, most=runs)
    return Timing.of(times)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "model\t")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
