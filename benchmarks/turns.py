"""Timing in turns: every way to compute gets a short turn, round after round, so that a drifting machine slows all.

A turn begins with a pause and one call that is not counted: the thread pool of the way before has gone to sleep by
then, and the caches hold what this way needs, as they do when it is used alone.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from saae_runtime.engine import Engine

__all__ = ["Turn", "calls", "in_turns", "stream"]

Turn = Callable[[float], list[float]]
"""Works for so many seconds and returns timed seconds, one or more; see `calls` and `stream`."""

Key = TypeVar("Key", bound=Hashable)

PAUSE = 0.03
_FEWEST = 2
_STREAM_BATCHES = 4


def in_turns(
    turns: Mapping[Key, Turn],
    seconds: float,
    length: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Key, list[float]]:
    """Gives each entry turns until each has had about `seconds`; the garbage collector is off meanwhile.

    An entry whose turns take longer than they should sits out rounds, so that it ends with the others and its turns
    are still spread over the whole time.

    Args:
        turns: name -> turn.
        seconds: time for each entry.
        length: one turn's length in seconds, at most a quarter of `seconds`.
        progress: called with (turns past, turns in all).

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
                if used[name] > 1.5 * seconds * number / rounds:  # a turn has a call before what it counts
                    continue
                time.sleep(PAUSE)
                start = time.perf_counter()
                found[name] += turn(length)
                used[name] += time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return found


def calls(call: Callable[[], object]) -> Turn:
    """A turn of single calls: the first is not counted, then as many as fit, at least two; seconds of each."""

    def turn(seconds: float) -> list[float]:
        call()
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < _FEWEST or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    return turn


def stream(engine: Engine, frames: Sequence[Any], batch: int) -> Turn:
    """A turn of `engine.stream`: one value, seconds per batch once the pipeline is full, until the source ends.

    What fills the pipeline (as many batches as it holds) is not counted, nor is what is left when time is up.
    """

    def turn(seconds: float) -> list[float]:
        stop = False
        skipped = (engine.backend.slots + 2) * batch  # in flight, and waiting before and after
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
