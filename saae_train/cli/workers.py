"""Where a command's jobs run (`--processes` here, `--ray` on a cluster), and their progress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from saae_runtime.cluster import connected

from ..experiments.jobs import Job, Processes, Workers

__all__ = ["Board", "FitsAtOnce", "opened_workers"]

FitsAtOnce = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Fits at once, each in a process of its own; they share the cores, and take turns at the GPUs. Default: "
        "one; with --ray one for each GPU, or for each machine.",
        show_default=False,
    ),
]


@contextmanager
def opened_workers(processes: int | None, cluster: str | None, device: str | None) -> Iterator[Workers]:
    """The workers that `--processes` and `--ray` ask for; within the block this process is connected to the cluster.

    Args:
        processes: how many at once.
        cluster: its address, see `saae_runtime.ray_options.asked_cluster`.
        device: torch device of the jobs.

    Raises:
        BackendUnavailableError: no Ray, or no cluster.
        ConfigError: the cluster is too small.
    """
    if cluster is not None:
        from ..experiments.ray_jobs import RayTasks

        with connected(cluster):
            yield RayTasks(processes, device)
    elif processes is None or processes == 1:
        yield Processes()  # every core and GPU to one fit after another
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        yield Processes(processes, max(1, cores // processes), _gpus() if device in (None, "cuda") else ())


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


class Board:
    """Progress of a command's jobs: on a terminal a bar for all and one for each running job, else a line per job.

    A context manager.

    Args:
        console: the log's console.
        what: what is counted.
        total: how many.
    """

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console = console
        fields = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*fields, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bar.add_task(what, total=total)
        self._rows: dict[Any, tuple[str, TaskID]] = {}

    def __enter__(self) -> Board:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def started(self, key: Any, title: str) -> None:
        """A job has started."""
        self._rows[key] = title, self._bar.add_task(escape(title), total=None)
        if not self._console.is_terminal:
            self._console.print(f"{escape(title)} ...")

    def report(self, key: Any, what: str, done: int, total: int) -> None:
        """A running job has made progress."""
        title, row = self._rows[key]
        self._bar.update(row, description=escape(f"{title}: {what}"), completed=done, total=total or None)

    def died(self, job: Job, why: str) -> None:
        """A job is started again."""
        self.say(f"{job.name}: its process {why}; again", "yellow")

    def done(self, key: Any) -> None:
        """A job has ended, or was done before."""
        if key in self._rows:
            self._bar.remove_task(self._rows.pop(key)[1])
        self._bar.advance(self._all)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        self._console.print(escape(text), style=style)
