"""Turns of `Engine.stream`, full and triggered, for the interleaved timer of `saae_train.experiments.timing`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

from saae_runtime.engine import Engine
from saae_train.experiments.timing import Turn

__all__ = ["stream", "trigger"]

_STREAM_BATCHES = 4
_GAP = 0.03  # seconds from the results of a batch to the next one
_LONGEST = 5.0  # seconds; a later result waits for the next frame


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


def trigger(engine: Engine, frames: Sequence[Any], batch: int) -> Turn:
    """A turn of `engine.stream` over a source slower than the engine: seconds from a batch given to its results out.

    The source gives the next batch after a gap that begins with the previous results, like a camera that is triggered
    by parts. The time of a batch begins when its last frame is given; the first batch is not counted.
    """

    def turn(seconds: float) -> list[float]:
        stop = False
        given: list[float] = []
        used = threading.Semaphore(0)

        def source() -> Any:
            endless = itertools.cycle(frames)
            while not stop:
                for place in range(batch):
                    if place == batch - 1:
                        given.append(time.perf_counter())
                    yield next(endless)
                used.acquire(timeout=_LONGEST)
                time.sleep(_GAP)

        found: list[float] = []
        deadline = time.perf_counter() + seconds
        for count, _ in enumerate(engine.stream(source(), batch_size=batch), 1):
            if count % batch == 0:
                found.append(time.perf_counter() - given[count // batch - 1])
                stop = len(found) > 2 and time.perf_counter() >= deadline
                used.release()
        return found[1:]

    return turn
