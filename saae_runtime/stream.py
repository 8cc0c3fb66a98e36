"""A pipeline over a source of frames: read and resize, compute, and use results, at the same time and in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, RawOutputs, Ticket
from .errors import SaaeError

__all__ = ["Channel", "Pipeline"]

T = TypeVar("T")


class Closed(Exception):
    """The other end of a channel is gone."""


class Channel(Generic[T]):
    """A bounded queue between two threads that either side can close; nobody waits on a closed one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._cancelled = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Adds an item, waiting for room. Raises Closed once the reader has cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._capacity or self._cancelled)
            if self._cancelled:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Takes the next item, waiting for one. At the end raises the writer's error, or Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._cancelled)
            if self._items and not self._cancelled:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise Closed

    def end(self, error: BaseException | None = None) -> None:
        """The writer is done; what is queued can still be read, then `error` is raised."""
        with self._changed:
            self._ended = True
            self._error = self._error or error
            self._changed.notify_all()

    def cancel(self, error: BaseException | None = None) -> None:
        """Stops both sides at once; what is queued is dropped."""
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._error = error
            self._changed.notify_all()


class Pipeline(Generic[T]):
    """Runs a source through a backend on two threads.

    One thread takes items from the source and prepares batches, one keeps up to `backend.slots` batches in flight;
    the caller's thread takes results. Order is kept. An exception of the source, or of preparing or computing, is
    raised to the caller in its place, after the results before it.

    Args:
        source: its iterator runs on the reading thread.
        prepare: turns an item into (what the caller wants back, uint8 H x W x 3 at the graph's size).
        backend: computes.
        threshold: pixel threshold T.
        batch_size: items in one batch; the last batch may be smaller.
    """

    def __init__(
        self,
        source: Iterable[object],
        prepare: Callable[[object], tuple[T, NDArray[np.uint8]]],
        backend: Backend,
        threshold: float,
        batch_size: int = 1,
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._backend = backend
        self._threshold = threshold
        self._batch_size = batch_size
        self._ready: Channel[tuple[list[T], NDArray[np.uint8]]] = Channel(backend.slots + 1)
        self._done: Channel[tuple[list[T], RawOutputs]] = Channel(backend.slots + 1)
        self._reader = threading.Thread(target=self._read, name="saae-read", daemon=True)
        self._worker = threading.Thread(target=self._compute, name="saae-compute", daemon=True)

    def __iter__(self) -> Iterator[tuple[list[T], RawOutputs]]:
        self._reader.start()
        self._worker.start()
        try:
            while True:
                try:
                    item = self._done.get()
                except Closed:
                    return
                yield item
        finally:
            self.stop()

    def stop(self, error: BaseException | None = None) -> None:
        """Ends both threads and waits for the work in flight; a caller still waiting gets `error`."""
        self._ready.cancel()
        self._done.cancel(error)
        if self._worker.ident is not None and self._worker is not threading.current_thread():
            self._worker.join()
        if self._reader.ident is not None and self._reader is not threading.current_thread():
            # A camera that delivers nothing cannot be interrupted; the thread ends with its next frame.
            self._reader.join(timeout=1.0)

    def _read(self) -> None:
        items: list[tuple[T, NDArray[np.uint8]]] = []
        try:
            try:
                for item in self._source:
                    items.append(self._prepare(item))
                    if len(items) == self._batch_size:
                        full, items = items, []
                        self._pass_on(full)
            finally:
                self._pass_on(items)  # the last, smaller batch; and what came before a failure still counts
            self._ready.end()
        except Closed:
            pass
        except BaseException as error:  # handed to the caller's thread
            self._ready.end(error)

    def _pass_on(self, items: list[tuple[T, NDArray[np.uint8]]]) -> None:
        if items:
            contexts, frames = zip(*items, strict=True)
            batch = frames[0][None] if len(frames) == 1 else np.stack(frames)
            self._ready.put((list(contexts), batch))

    def _compute(self) -> None:
        flying: deque[tuple[list[T], Ticket]] = deque()
        try:
            try:
                while True:
                    try:
                        context, frames = self._ready.get()
                    except BaseException:
                        while flying:
                            self._collect(flying)
                        raise
                    flying.append((context, self._backend.submit(frames, self._threshold)))
                    if len(flying) >= self._backend.slots:
                        self._collect(flying)
            finally:
                for _, ticket in flying:  # every ticket is collected, also when nobody wants it any more
                    with suppress(SaaeError):
                        self._backend.collect(ticket)
        except Closed:
            self._done.end()
        except BaseException as error:
            self._ready.cancel()
            self._done.end(error)

    def _collect(self, flying: deque[tuple[list[T], Ticket]]) -> None:
        context, ticket = flying.popleft()
        self._done.put((context, self._backend.collect(ticket)))
