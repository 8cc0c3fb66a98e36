"""A thread with a client of tritonclient for HTTP: gevent binds each client to the thread that first used it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["ClientThread"]

_Answer = TypeVar("_Answer")
_Job = tuple[Callable[[Any], Any], "Future[Any]"]


class ClientThread:
    """Makes a client in a thread of its own and runs calls there. Ends with `close`, or when nobody holds it.

    Args:
        make: makes the client; called in the thread by the first call.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs, make), name="saae-triton-http", daemon=True)
        self._thread.start()

    def call(self, job: Callable[[Any], _Answer]) -> _Answer:
        """What `job` returns or raises, called with the client."""
        future: Future[_Answer] = Future()
        self._jobs.put((job, future))
        return future.result()

    def close(self) -> None:
        """Close the client, after the call in progress, and end the thread. May be called twice."""
        self._jobs.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._jobs.put(None)


def _work(jobs: SimpleQueue[_Job | None], make: Callable[[], Any]) -> None:
    client = None
    while True:
        item = jobs.get()
        if item is None:
            break
        job, future = item
        try:
            client = make() if client is None else client
            future.set_result(job(client))
        except BaseException as error:
            future.set_exception(error)
        del item, job, future  # an answer is not kept until the next call
    if client is not None:
        with suppress(Exception):
            client.close()
        with suppress(Exception):  # gevent's files of this thread stay open otherwise
            importlib.import_module("gevent").get_hub().destroy(destroy_loop=True)
