"""Scores image files on several workers, each with its own engine; outcomes in order, none lost or doubled."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from ..cluster import WorkerDied
from ..engine import Engine
from ..errors import BackendError, FrameError, SaaeError
from ..sources.files import Frame, Source, image_frames
from .scoring import Outcome, of_frame

__all__ = ["Pool", "ProcessPool", "score_in_pool", "score_source"]

_AHEAD = 4  # sources in flight per worker
_TRIES = 3  # attempts for a source whose worker died, until it counts as the source's fault
_Scored = list[Outcome]

_engine: Engine | None = None  # of a worker


class Pool(Protocol):
    """Workers: processes of this machine, or of a cluster."""

    workers: int

    def submit(self, source: Source) -> Any:
        """Start `score_source` on a source; never raises."""

    def result(self, begun: Any) -> list[Outcome]:
        """Wait for a started source. Raises WorkerDied, and the errors of `score_source`."""

    def restart(self) -> None:
        """Replace all workers and drop what they had started."""

    def close(self) -> None:
        """End all workers."""


def score_source(engine: Engine, source: Source, keep_images: bool) -> list[Outcome]:
    """The outcomes of one image file: one, or one for each of its pages.

    Args:
        engine: an open engine.
        source: an image.
        keep_images: whether outcomes hold their frames.

    Raises:
        SaaeError: the engine failed.
    """
    outcomes = []
    for frame in image_frames(source, white_level=engine.white_level):
        bare = frame if keep_images else replace(frame, image=None)
        if frame.image is None:
            outcomes.append(Outcome(frame, error=frame.error))
            continue
        try:
            outcomes.append(Outcome(bare, engine(frame.image)))
        except (FrameError, MemoryError) as error:
            outcomes.append(Outcome(bare, error=of_frame(frame, error)))
    return outcomes


def score_in_pool(
    pool: Pool, sources: Sequence[Source], stop: threading.Event | None = None
) -> Generator[Outcome, None, None]:
    """Score image files on a pool's workers; a file that cannot be read or scored gives an outcome with its error.

    A worker that dies (killed, out of memory) is replaced, and unfinished files are scored again, one by one for a
    while. A file that kills a worker three times gets an error. The time of a frame is its share of the pool's time.

    Args:
        pool: closed at the end.
        sources: images, in the order of the outcomes.
        stop: when set, no further file is started; those in flight are still returned.

    Raises:
        SaaeError: an engine could not be opened, or failed; earlier outcomes have been returned.
    """
    stopped = stop if stop is not None else threading.Event()
    left = deque(sources)
    flying: deque[tuple[Source, Any]] = deque()
    done = deque([time.perf_counter()], maxlen=pool.workers + 1)
    careful = 0  # this many files one at a time: one of them killed a worker
    tries = 0
    try:
        while True:
            ahead = 1 if careful else _AHEAD * pool.workers
            while left and len(flying) < ahead and not stopped.is_set():
                source = left.popleft()
                flying.append((source, pool.submit(source)))
            if not flying:
                return
            source, begun = flying[0]
            try:
                outcomes = pool.result(begun)
            except WorkerDied:
                pool.restart()
                tries += 1
                alone = len(flying) == 1
                careful = max(careful, len(flying))
                left.extendleft(again for again, _ in reversed(flying))
                flying.clear()
                if not alone or tries < _TRIES:
                    continue
                left.popleft()
                outcomes = [Outcome(Frame(source, 0, None, _deadly(source)), error=_deadly(source))]
            else:
                flying.popleft()
            tries, careful = 0, max(0, careful - 1)
            for outcome in outcomes:
                done.append(time.perf_counter())
                share = 1000 * (done[-1] - done[0]) / (len(done) - 1)
                yield outcome if outcome.result is None else replace(outcome, milliseconds=share)
    finally:
        pool.close()


class ProcessPool:
    """Processes of this machine.

    Args:
        open_engine: opens a worker's engine; a function of a module, or a `partial`, because it is sent to the workers.
        processes: number of processes.
        keep_images: whether outcomes hold the frames, for pictures of them.
    """

    def __init__(self, open_engine: Callable[[], Engine], processes: int, keep_images: bool = False) -> None:
        self._arguments = (open_engine, os.getpid())
        self.workers = processes
        self._keep_images = keep_images
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # spawn: a fork would copy locks that threads of ours hold, and what the inference library has opened.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, context, _begin, self._arguments)

    def submit(self, source: Source) -> Future[_Scored]:
        """See `Pool`."""
        try:
            with _no_interrupt():  # the first files start the workers
                return self._executor.submit(_work, source, self._keep_images)
        except BrokenProcessPool as error:  # a worker has died since the last result
            failed: Future[_Scored] = Future()
            failed.set_exception(error)
            return failed

    def result(self, begun: Future[_Scored]) -> _Scored:
        """See `Pool`."""
        try:
            return begun.result()
        except BrokenProcessPool as error:
            raise WorkerDied from error

    def restart(self) -> None:
        """See `Pool`."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = self._start()

    def close(self) -> None:
        """See `Pool`."""
        self._executor.shutdown(wait=True, cancel_futures=True)


_failed: SaaeError | None = None  # from a worker that could not open its engine


def _begin(open_engine: Callable[[], Engine], parent: int) -> None:
    """In a new worker: open its engine, and end with the parent."""
    global _engine, _failed
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        _engine = open_engine()
    except SaaeError as error:  # an exception here would only be reported as a broken pool
        _failed = error


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started within the block ignore Ctrl-C, which this process handles after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(source: Source, keep_images: bool) -> _Scored:
    if _failed is not None:
        raise _failed
    assert _engine is not None
    return score_source(_engine, source, keep_images)


def _deadly(source: Source) -> SaaeError:
    return BackendError(
        f"{source.name}: the worker that scored it died, {_TRIES} times.",
        "It was killed (by the system, where memory runs out), or a library crashed.",
        "score it alone to see why; use fewer --processes if memory is short",
    )
