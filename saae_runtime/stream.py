"""A pipeline over a source of frames: reads and resizes, computes, and returns results in parallel and in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, RawOutputs, Ticket
from .ending import native_call

__all__ = ["Channel", "Pipeline"]

T = TypeVar("T")


class Closed(Exception):
    """The other end of a channel is closed."""


class Channel(Generic[T]):
    """A bounded queue between two threads; closing it wakes both sides."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._cancelled = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Add an item, waiting for room. Raises Closed once the reader has cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._capacity or self._cancelled)
            if self._cancelled:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the next item, waiting for one. At the end raises the writer's error, or Closed."""
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
        """The writer is done; queued items can still be read, then `error` is raised."""
        with self._changed:
            self._ended = True
            self._error = self._error or error
            self._changed.notify_all()

    def cancel(self, error: BaseException | None = None) -> None:
        """Stop both sides at once and drop queued items."""
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._error = error
            self._changed.notify_all()


class Pipeline(Generic[T]):
    """Runs a source through a backend on three threads.

    One thread takes items from the source and prepares batches, one submits them, up to `backend.slots` in flight, and
    one collects them; the caller's thread takes results. A result is returned as soon as it is computed, whether or not
    the source has a next item. Order is kept. An exception of the source, or of preparing or computing, is raised to
    the caller after the earlier results.

    Args:
        source: its iterator runs on the reading thread.
        prepare: turns an item into (value for the caller, uint8 H x W x 3 at the graph's size).
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
        self._flying: Channel[tuple[list[T], Ticket]] = Channel(backend.slots)
        self._free = threading.Semaphore(backend.slots)
        self._done: Channel[tuple[list[T], RawOutputs]] = Channel(backend.slots + 1)
        self._reader = threading.Thread(target=self._read, name="saae-read", daemon=True)
        self._workers = (
            threading.Thread(target=self._submit, name="saae-submit", daemon=True),
            threading.Thread(target=self._collect, name="saae-collect", daemon=True),
        )

    def __iter__(self) -> Iterator[tuple[list[T], RawOutputs]]:
        self._reader.start()
        for worker in self._workers:
            worker.start()
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
        """End the threads and wait for the work in flight; a caller still waiting gets `error`."""
        self._ready.cancel()
        self._done.cancel(error)
        for worker in self._workers:
            if worker.ident is not None and worker is not threading.current_thread():
                worker.join()
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
                self._pass_on(items)  # the last, smaller batch, also before a failure
            self._ready.end()
        except Closed:
            pass
        except BaseException as error:  # raised in the caller's thread
            self._ready.end(error)

    def _pass_on(self, items: list[tuple[T, NDArray[np.uint8]]]) -> None:
        if items:
            contexts, frames = zip(*items, strict=True)
            batch = frames[0][None] if len(frames) == 1 else np.stack(frames)
            self._ready.put((list(contexts), batch))

    def _submit(self) -> None:
        try:
            while True:
                self._free.acquire()  # first wait for a slot, so that items are not taken too early
                context, frames = self._ready.get()
                with native_call():
                    ticket = self._backend.submit(frames, self._threshold)
                self._flying.put((context, ticket))
        except Closed:
            self._flying.end()
        except BaseException as error:  # error of the source or backend, raised after the work in flight
            self._ready.cancel()
            self._flying.end(error)

    def _collect(self) -> None:
        """Collect every ticket, even if the results are no longer wanted."""
        failure: BaseException | None = None
        wanted = True
        while True:
            try:
                context, ticket = self._flying.get()
            except Closed:
                break
            except BaseException as error:
                failure = failure or error
                break
            try:
                with native_call():
                    outputs = self._backend.collect(ticket)
            except BaseException as error:
                failure, wanted = failure or error, False
                self._ready.cancel()
                continue
            finally:
                self._free.release()
            if wanted:
                wanted = self._hand_on(context, outputs)
        self._done.end(failure)

    def _hand_on(self, context: list[T], outputs: RawOutputs) -> bool:
        """Give a result to the caller; False if the caller has stopped."""
        try:
            self._done.put((context, outputs))
        except Closed:
            return False
        return True
