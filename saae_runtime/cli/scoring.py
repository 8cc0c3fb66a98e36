"""Scores frames from sources in order, with one outcome for each, and counts them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine
from ..errors import FrameError, SaaeError
from ..result import Result
from ..sources.files import Frame

__all__ = ["Outcome", "Summary", "of_frame", "score_frames"]

_REMEMBERED = 100_000  # times kept for median and p95; bounded, because a camera may run for months


@dataclass(frozen=True)
class Outcome:
    """The outcome of one frame: `result` and `milliseconds`, or an error."""

    frame: Frame
    result: Result | None = None
    milliseconds: float | None = None
    error: SaaeError | None = None


@dataclass
class Summary:
    """Counts and times of a run, collected by `add`.

    scored, defects, errors: numbers of frames. seconds: from the first frame's reading to the last outcome.
    """

    scored: int = 0
    defects: int = 0
    errors: int = 0
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def add(self, outcome: Outcome) -> None:
        """Count an outcome after it was handled."""
        self.ended = time.perf_counter()
        if outcome.result is None:
            self.errors += 1
            return
        self.scored += 1
        self.defects += outcome.result.is_anomalous
        if outcome.milliseconds is not None:
            self._times.append(outcome.milliseconds)

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run."""
        return max(self.ended - self.started, 0.0)

    @property
    def frames_per_second(self) -> float:
        """Frames scored by wall-clock time: reading, scoring and writing, overlapped as they are."""
        return self.scored / self.seconds if self.seconds > 0 else 0.0

    def milliseconds(self, share: float) -> float | None:
        """The time per frame that this share of the (last 100,000) frames stays within; None without frames."""
        return float(np.quantile(np.asarray(self._times), share)) if self._times else None

    @property
    def exit_code(self) -> int:
        """1: a defect was found; 3: no defect, but frames could not be read; 0: every frame was read and is clean."""
        if self.defects:
            return 1
        return 3 if self.errors or not self.scored else 0


def score_frames(
    engine: Engine,
    frames: Iterator[Frame],
    *,
    batch: int = 1,
    live: bool = False,
    stop: threading.Event | None = None,
) -> Generator[Outcome, None, None]:
    """Score frames, in order; a frame that cannot be read or scored gives an outcome with its error.

    Files go through `Engine.stream`: reading, computing and the caller's use of outcomes overlap. The time of a
    frame is then its share of the pipeline's time: the time of the last `batch` outcomes, divided by `batch`. Live
    frames are scored one by one, so that none waits for the next; their time is that of the engine's call.

    Args:
        engine: an open engine.
        frames: from `saae_runtime.sources.files.read_frames`; closed at the end.
        batch: frames computed together.
        live: the frames come in real time.
        stop: when set, no further frame is taken; those in flight are still returned.

    Raises:
        SaaeError: the engine or a camera failed; earlier outcomes have been returned.
    """
    stopped = stop if stop is not None else threading.Event()
    try:
        yield from _one_by_one(engine, frames, stopped) if live else _streamed(engine, frames, batch, stopped)
    finally:
        close = getattr(frames, "close", None)
        if close is not None:
            with suppress(ValueError):  # the reading thread still uses it and ends with its frame
                close()


def _one_by_one(engine: Engine, frames: Iterator[Frame], stop: threading.Event) -> Iterator[Outcome]:
    while not stop.is_set() and (frame := next(frames, None)) is not None:
        if frame.image is None:
            yield Outcome(frame, error=frame.error)
            continue
        started = time.perf_counter()
        try:
            result = engine(frame.image)
        except (FrameError, MemoryError) as error:
            yield Outcome(frame, error=of_frame(frame, error))
            continue
        yield Outcome(frame, result, 1000 * (time.perf_counter() - started))


def _streamed(engine: Engine, frames: Iterator[Frame], batch: int, stop: threading.Event) -> Iterator[Outcome]:
    pending: deque[Frame] = deque()  # filled by the stream's reading thread, emptied here
    backlog: deque[Frame] = deque()  # already read when the previous stream had to end
    done = deque([time.perf_counter()], maxlen=batch + 1)

    def images() -> Iterator[NDArray[np.uint8]]:
        while backlog or not stop.is_set():
            frame = backlog.popleft() if backlog else next(frames, None)
            if frame is None:
                return
            pending.append(frame)
            if frame.image is not None:
                yield frame.image

    def unreadable() -> Iterator[Outcome]:
        while pending and pending[0].image is None:
            frame = pending.popleft()
            yield Outcome(frame, error=frame.error)

    again = True
    while again:
        again = False
        results = cast(Generator[Result, None, None], engine.stream(images(), batch_size=batch))
        try:
            for result in results:
                yield from unreadable()
                done.append(time.perf_counter())
                yield Outcome(pending.popleft(), result, 1000 * (done[-1] - done[0]) / (len(done) - 1))
        except (FrameError, MemoryError) as error:
            # Raised for this frame: report it and go on, first with the frames that were read ahead.
            results.close()
            yield from unreadable()
            frame = pending.popleft()
            yield Outcome(frame, error=of_frame(frame, error))
            again = True
        finally:
            results.close()
            if again:
                backlog.extend(pending)
                pending.clear()
    yield from unreadable()


def of_frame(frame: Frame, error: FrameError | MemoryError) -> SaaeError:
    if isinstance(error, FrameError):
        return error
    shape = "" if frame.image is None else f" of {frame.image.shape[1]} x {frame.image.shape[0]} pixels"
    return FrameError(
        f"{frame.name}: there is not enough memory to score a frame{shape}.",
        str(error),
        "scale it down, cut it into pieces, or give this machine more memory",
    )
