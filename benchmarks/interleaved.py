"""Turns of `Engine.stream` for the interleaved timer of `saae_train.experiments.timing`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from saae_runtime.engine import Engine
from saae_train.experiments.timing import Turn

__all__ = ["stream"]

_STREAM_BATCHES = 4


def stream(engine: Engine, frames: Sequence[Any], batch: int) -> Turn:
    """A turn that runs `engine.stream` and returns one value: seconds per batch while the pipeline is full.

    The batches that fill and drain the pipeline are not counted.
    """

    def turn(seconds: float) -> list[float]:
        stop = False
        skipped = (engine.backend.slots + 2) * batch  # in flight, and queued before and after
        least = skipped + _STREAM_BATCHES * batch

        def source() -> Any:
            for frame in itertools.cycle(frames):
                if stop:
                    return
                yield frame

        begin = end = time.perf_counter()
        deadline = begin + seconds
        count = counted = 0
        for _ in engine.stream(source(), batch_size=batch):
            count += 1
            if count % batch or stop:
                continue
            now = time.perf_counter()
            if count <= skipped:
                begin = now
            else:
                end, counted = now, counted + 1
            stop = count >= least and now >= deadline
        return [(end - begin) / counted]

    return turn
