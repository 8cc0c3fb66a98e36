"""Time per frame of a bundle's backends on this machine, frame to result."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saae_runtime import backends
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError

from ..report.data import LatencyRow

__all__ = ["INSIDE", "machine", "measure"]

INSIDE = "frame to result: host resize where needed, inference, map and mask at the frame's size"

_WARM_UP = 3


def measure(
    bundle: Bundle,
    frames: Sequence[NDArray[np.uint8]],
    runs: int = 30,
    seconds: float = 8.0,
    skipped: Callable[[str], None] = lambda text: None,
) -> Iterator[LatencyRow]:
    """Times every backend that `auto` considers and that works here, at every precision, one frame at a time.

    Args:
        bundle: an opened bundle.
        frames: uint8 H x W x 3, used in turn.
        runs: calls per backend, after three that are not counted.
        seconds: stop a backend earlier after so long (never before five calls).
        skipped: told of a backend that looked usable and is not: its name, precision and the reason.
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
                    times = _times(engine, frames, runs, seconds)
            except BackendError as error:  # a provider's libraries are only loaded when it is opened
                skipped(f"{candidate.name} {precision}: {error.what} {error.why}".strip())
                continue
            yield LatencyRow(
                backend=candidate.name,
                precision=precision,
                median_ms=float(np.median(times)),
                p95_ms=float(np.percentile(times, 95)),
                inside=INSIDE,
                runs=len(times),
                where=machine(),
            )


def machine() -> str:
    """The processor and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'' if cores == 1 else 's'}"


def _times(engine: Engine, frames: Sequence[NDArray[np.uint8]], runs: int, seconds: float) -> list[float]:
    for index in range(_WARM_UP):
        engine(frames[index % len(frames)])
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < runs and (len(times) < 5 or time.perf_counter() - began < seconds):
        start = time.perf_counter()
        engine(frames[len(times) % len(frames)])
        times.append(1000 * (time.perf_counter() - start))
    return times


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "model\t")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
