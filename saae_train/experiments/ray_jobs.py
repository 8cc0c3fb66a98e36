"""Long jobs on a Ray cluster: each is a Ray task that runs the job in a fresh process on its machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from saae_runtime.cluster import WorkerDied, deaths, library, shares
from saae_runtime.errors import SaaeError

from .jobs import Job, Processes, Report, read_message

__all__ = ["RayTasks"]

_PATIENCE = 30.0
"""Seconds for tasks to end cleanly before their workers are killed."""

_HANDED_ON = ("SAAE_", "HF_")
"""Prefixes of the environment variables that are passed on to jobs."""


class RayTasks:
    """Tasks of the cluster that this process is connected to; see `saae_train.experiments.jobs.Workers`.

    Each takes a GPU if the cluster has any and `device` allows it, else its share of the CPUs. Folders are
    at the same paths on every machine.

    Args:
        room: how many at once; None: one for each GPU, or for each machine.
        device: torch device of the jobs; None: a GPU where there is one.

    Raises:
        ConfigError: the cluster is too small.
    """

    def __init__(self, room: int | None = None, device: str | None = None) -> None:
        self._ray = library()
        there = self._ray.cluster_resources().get("GPU", 0) > 0
        self.gpus = int(there if device is None else device.startswith("cuda"))
        self.room, self.cpus = shares(room, self.gpus)
        self._begin = self._ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, max_calls=1)(_perform)
        self._waiting: list[Any] = []

    def begin(self, job: Job, report: Report) -> Any:
        """See `Workers`. Progress within a job is not sent between machines."""
        report("on the cluster", 0, 0)
        variables = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
        begun = self._begin.remote(job, self.cpus, str(Path.cwd()), variables)
        self._waiting.append(begun)
        return begun

    def first(self, begun: Sequence[Any]) -> Any:
        """See `Workers`."""
        while True:  # in pieces, so that Ctrl-C is noticed
            ready, _ = self._ray.wait(list(begun), num_returns=1, timeout=1.0)
            if ready:
                return next(item for item in begun if item == ready[0])

    def result(self, ended: Any) -> Mapping[str, Any]:
        """See `Workers`."""
        self._waiting.remove(ended)
        try:
            message = self._ray.get(ended)
        except deaths() as error:
            raise WorkerDied(f"ended on the cluster ({type(error).__name__})") from error
        except self._ray.exceptions.RayError as error:
            raise SaaeError(
                "The cluster failed.", f"{type(error).__name__}: {error}", "ray status shows more"
            ) from error
        return read_message(message, message.get("died", ""))

    def close(self) -> None:
        """See `Workers`."""
        for force, patience in ((False, _PATIENCE), (True, 1.0)):
            for begun in self._waiting:
                with suppress(Exception):
                    self._ray.cancel(begun, force=force)
            until = time.monotonic() + patience
            while self._waiting and time.monotonic() < until:
                _, self._waiting = self._ray.wait(self._waiting, num_returns=1, timeout=0.5)
        self._waiting.clear()


def _perform(job: Job, threads: int, folder: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a job in a fresh process on a machine of the cluster; return its last message, or how it died."""
    os.environ.update(variables)
    with suppress(OSError):
        os.chdir(folder)  # relative paths start here
    workers = Processes(threads=threads, grace=0.0)
    try:
        running = workers.first([workers.begin(job, lambda what, done, total: None)])
        return running.message or {"died": f"ended with code {running.process.exitcode}"}
    finally:
        workers.close()
