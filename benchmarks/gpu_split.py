"""Where a frame's time on the GPU goes, by CUDA events: copy in, computation, copy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from saae_runtime.backends.cuda.api import CudaApi

if TYPE_CHECKING:
    from saae_runtime.backends.base import Backend

__all__ = ["PARTS", "Split", "TimedCuda", "split"]

PARTS = ("copy_in", "compute", "copy_out")


class Split(Protocol):
    """CUDA that takes the time of the last batch: milliseconds by part."""

    def parts_ms(self) -> dict[str, float]: ...


class Stamps:
    """Mixed into a CudaApi: events with timing, and the three of the last batch that went through one slot at a time.

    The TensorRT backend records an event after the copy in, the computation and the copy out, in this order; the start
    is recorded here, before the first copy of a batch.
    """

    _begin: int | None = None
    _ends: list[int]
    _open = False

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        if not self._open:
            if self._begin is None:
                self._begin = self.event()  # type: ignore[attr-defined]
            self._open, self._ends = True, []
            super().record(self._begin, stream)  # type: ignore[misc]
        super().copy_in(device, host, nbytes, stream)  # type: ignore[misc]

    def record(self, event: int, stream: int) -> None:
        super().record(event, stream)  # type: ignore[misc]
        if self._open:
            self._ends.append(event)
            self._open = len(self._ends) < len(PARTS)

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of each part of the last batch, which has been waited for."""
        assert self._begin is not None
        marks = [self._begin, *self._ends]
        return {
            name: self.elapsed_ms(marks[index], marks[index + 1])  # type: ignore[attr-defined]
            for index, name in enumerate(PARTS)
        }


class TimedCuda(Stamps, CudaApi):
    """CUDA whose events take the time."""

    def event(self, blocking: bool = False) -> int:
        """An event with timing."""
        return int(self._call("cudaEventCreateWithFlags", self._rt.cudaEventDefault))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two events that were reached."""
        return float(self._call("cudaEventElapsedTime", start, end))


def split(backend: Backend, cuda: Split, batches: Sequence[int], runs: int, warm_up: int = 20) -> list[dict[str, Any]]:
    """Median milliseconds of each part and its share of the three, one batch at a time, for each batch size.

    Args:
        backend: the TensorRT backend, opened with `cuda`.
        cuda: takes the time.
        batches: batch sizes; those above the engine's largest are left out.
        runs: timed batches of each size.
        warm_up: batches before that.
    """
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        if backend.max_batch is not None and batch > backend.max_batch:
            continue
        frames = rng.integers(0, 256, (batch, *backend.frame_size, 3), np.uint8)
        found: dict[str, list[float]] = {name: [] for name in PARTS}
        for number in range(warm_up + runs):
            backend.infer(frames, 1.0)
            if number >= warm_up:
                for name, value in cuda.parts_ms().items():
                    found[name].append(value)
        medians = {name: float(np.median(values)) for name, values in found.items()}
        total = sum(medians.values())
        rows.append(
            {
                "batch": batch,
                "runs": runs,
                **{f"{name}_ms": round(value, 4) for name, value in medians.items()},
                **{f"{name}_share": round(value / total, 4) for name, value in medians.items()},
                "total_ms": round(total, 4),
            }
        )
    return rows
