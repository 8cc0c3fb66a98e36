"""Runs long jobs, each in its own process, here or on a cluster. A job whose process dies is retried."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from saae_runtime import errors
from saae_runtime.cluster import WorkerDied
from saae_runtime.errors import SaaeError

__all__ = ["TRIES", "Job", "Jobs", "Processes", "Report", "Task", "Workers", "read_message"]

Report = Callable[[str, int, int], None]
"""Called with (what is running, done, total)."""

Task = Callable[[Any, Report], Mapping[str, Any]]
"""Does a job: its argument in, plain JSON out. A module-level function, so that another process can import it."""

TRIES = 3
"""How often a job is started before a process that dies counts as the job's fault."""

_GRACE, _PATIENCE = 10.0, 20.0
"""Seconds to wait for a job to end after Ctrl-C (a fit saves its state first), then after SIGTERM."""


class Job(NamedTuple):
    """What to do.

    Attributes:
        name: for people.
        task: does it.
        argument: of the task; it is sent to the other process.
    """

    name: str
    task: Task
    argument: Any


class Workers(Protocol):
    """Where jobs run, each in a fresh process."""

    room: int

    def begin(self, job: Job, report: Report) -> Any:
        """Start a job and return its handle for the other calls. `report` may be called from `first`."""

    def first(self, begun: Sequence[Any]) -> Any:
        """Wait until one of these has ended, and return it."""

    def result(self, ended: Any) -> Mapping[str, Any]:
        """The task's result. Raises WorkerDied, or SaaeError if the task failed."""

    def close(self) -> None:
        """Stop running jobs cleanly: a fit saves its state."""


class Jobs:
    """Running jobs, as many at once as the workers have room for. A context manager; at its end all have stopped.

    Args:
        workers: closed at the end.
        died: called with each job that is started again, and how its process ended.
        tries: how often a job is started at most.
    """

    def __init__(
        self, workers: Workers, died: Callable[[Job, str], None] = lambda job, why: None, tries: int = TRIES
    ) -> None:
        self._workers, self._died, self._tries = workers, died, tries
        self._flying: list[tuple[Any, Any, Job, Report, int]] = []

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *exc: object) -> None:
        self._flying.clear()
        self._workers.close()

    @property
    def has_room(self) -> bool:
        """Whether another job may start."""
        return len(self._flying) < self._workers.room

    @property
    def keys(self) -> list[Any]:
        """Keys of the running jobs."""
        return [key for _, key, *_ in self._flying]

    def begin(self, key: Any, job: Job, report: Report) -> None:
        """Start a job; `next` returns its key."""
        self._flying.append((self._workers.begin(job, report), key, job, report, 1))

    def next(self) -> tuple[Any, Mapping[str, Any] | SaaeError]:
        """Wait for the first job to end; return its key, and its result or error.

        A job whose process died (killed, out of memory, machine lost) is started again.
        """
        while True:
            ended = self._workers.first([begun for begun, *_ in self._flying])
            (entry,) = (entry for entry in self._flying if entry[0] is ended)
            self._flying.remove(entry)
            _, key, job, report, tries = entry
            try:
                return key, self._workers.result(ended)
            except WorkerDied as error:
                if tries == self._tries:
                    return key, _deadly(job, str(error), tries)
                self._died(job, str(error))
                self._flying.append((self._workers.begin(job, report), key, job, report, tries + 1))
            except SaaeError as error:
                return key, error


def _deadly(job: Job, why: str, tries: int = 1) -> SaaeError:
    return SaaeError(
        f"The process of {job.name} {why}{f', {tries} times' if tries > 1 else ''}.",
        "A negative code is a signal; -9 usually means that memory ran out.",
        "run it alone, with less in --set components=... or a smaller input size",
    )


class _Running:
    """A process that runs a job."""

    def __init__(self, job: Job, report: Report, slot: int) -> None:
        self.job, self.report, self.slot = job, report, slot
        self.receiver: Connection
        self.process: Any
        self.message: dict[str, Any] = {}
        self.ended = False

    def read(self) -> None:
        """Read one message; after the last one wait for the process to end."""
        try:
            message = json.loads(self.receiver.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            self.receiver.close()
            self.ended = True
            return
        if "progress" in message:
            self.report(*message["progress"])
        else:
            self.message = message


class Processes:
    """Fresh processes of this machine; see `Workers`.

    Args:
        room: how many at once.
        threads: of each; None: what the libraries take, which is every core.
        gpus: numbers or names of GPUs, as in CUDA_VISIBLE_DEVICES; the processes take turns at them. Empty: each sees
            them all.
        grace: seconds for a process to end by the Ctrl-C that it got itself, before it gets a signal.
    """

    def __init__(
        self, room: int = 1, threads: int | None = None, gpus: Sequence[int | str] = (), grace: float | None = None
    ) -> None:
        self.room, self._threads, self._gpus = room, threads, tuple(gpus)
        self._grace = _GRACE if grace is None else grace
        self._running: list[_Running] = []

    def begin(self, job: Job, report: Report) -> _Running:
        """See `Workers`."""
        taken = {other.slot for other in self._running}
        running = _Running(job, report, next(slot for slot in range(len(taken) + 1) if slot not in taken))
        # spawn: a fork would copy locks that threads of ours hold.
        context = multiprocessing.get_context("spawn")
        running.receiver, sender = context.Pipe(duplex=False)
        running.process = context.Process(target=_child, args=(job, sender, os.getpid()), daemon=True)
        with _environment(self._variables(running.slot)):
            running.process.start()
        sender.close()  # the child holds the only sending end now: reading ends when the child ends
        self._running.append(running)
        return running

    def _variables(self, slot: int) -> dict[str, str]:
        found = {}
        if self._threads is not None:
            found["OMP_NUM_THREADS"] = str(self._threads)
        if self._gpus:
            found["CUDA_VISIBLE_DEVICES"] = str(self._gpus[slot % len(self._gpus)])
        return found

    def first(self, begun: Sequence[_Running]) -> _Running:
        """See `Workers`."""
        while True:
            for running in begun:
                if running.ended:
                    return running
            # In pieces, so that an interrupt from another thread, such as a cluster's, is noticed.
            ready = multiprocessing.connection.wait([running.receiver for running in begun], timeout=1.0)
            for running in begun:
                if running.receiver in ready:
                    running.read()

    def result(self, ended: _Running) -> Mapping[str, Any]:
        """See `Workers`."""
        self._running.remove(ended)
        if ended.process.exitcode == 128 + signal.SIGINT:
            raise _deadly(ended.job, "was interrupted")
        return read_message(ended.message, f"ended with code {ended.process.exitcode}")

    def close(self) -> None:
        """See `Workers`. Ctrl-C on a terminal reaches the processes as well; a signal to this one alone does not."""
        until = time.monotonic() + self._grace
        for running in self._running:
            running.process.join(max(0.0, until - time.monotonic()))
        for running in self._running:
            running.process.terminate()
        until = time.monotonic() + _PATIENCE
        for running in self._running:
            running.process.join(max(0.0, until - time.monotonic()))
            running.process.kill()
            running.process.join()
            running.receiver.close()
        self._running.clear()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a process that is started within the block; libraries read them when they load."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read_message(message: Mapping[str, Any], otherwise: str) -> Mapping[str, Any]:
    """The result in the last message of a process.

    Raises:
        SaaeError: the task's error, with its own class if saae defines it.
        WorkerDied: there was no message.
    """
    if "row" in message:
        row: Mapping[str, Any] = message["row"]
        return row
    if "error" in message:
        told = message["error"]
        kind: Any = getattr(errors, told["kind"], SaaeError) if told["kind"] in errors.__all__ else SaaeError
        raise kind(told["what"], told["why"], told["cure"])
    raise WorkerDied(otherwise)


def _child(job: Job, sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it as cleanly as Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which does not reach a cluster's processes
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    last = [0.0]

    def send(**message: Any) -> None:
        sender.send_bytes(json.dumps(message, allow_nan=False).encode())

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last[0] > 0.1:
            last[0] = now
            send(progress=[what, done, total])

    try:
        send(row=job.task(job.argument, report))
    except SaaeError as error:
        send(error={"kind": type(error).__name__, "what": error.what, "why": error.why, "cure": error.cure})
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # a full GPU, a library's own error: report it, so that the other jobs go on
        if os.environ.get("SAAE_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"Raised in {Path(where.filename).name}, line {where.lineno}."
        what = f"{type(error).__name__}: {error}"
        send(error={"kind": "", "what": what, "why": why, "cure": "SAAE_DEBUG=1 shows more"})


def _end_with(parent: int) -> None:
    """Stop this process as Ctrl-C does if its parent has died."""
    while os.getppid() == parent:
        time.sleep(0.5)
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)
