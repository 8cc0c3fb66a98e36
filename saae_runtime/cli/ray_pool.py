"""Workers on a Ray cluster: actors with an engine each, on this machine or on others that see the same files."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..engine import Engine
from ..errors import BackendUnavailableError, ConfigError, SaaeError
from ..sources.files import Source
from .pool import WorkerDied, score_source
from .scoring import Outcome

__all__ = ["RayPool", "connected"]


def _library() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a line's machine tells nobody that it runs
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise BackendUnavailableError("--ray needs the package ray.", str(error), "pip install 'saae[ray]'") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within the block this process is connected to a cluster; a program that already is stays so.

    Args:
        address: `local` (one is started here, and ended with the block), `auto` (the one that this machine is part
            of), or `host:port`.

    Raises:
        BackendUnavailableError: ray is not installed, or no cluster answers.
    """
    ray = _library()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:  # ConnectionError, RuntimeError and its own, from release to release
        raise BackendUnavailableError(
            f"--ray {address}: there is no cluster.",
            f"{type(error).__name__}: {error}",
            "ray start --head on one machine, or --ray local; without Ray: --processes",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Worker:
    """The state of one actor."""

    def __init__(self, open_engine: Callable[[], Engine], keep_images: bool) -> None:
        self._keep_images = keep_images
        self._failed: SaaeError | None = None
        try:
            self._engine = open_engine()
        except SaaeError as error:  # an exception here would only be told as a dead actor
            self._failed = error

    def score(self, source: Source) -> list[Outcome]:
        if self._failed is not None:
            raise self._failed
        return score_source(self._engine, source, self._keep_images)


class RayPool:
    """Actors of a cluster; see `saae_runtime.cli.pool.Pool`.

    Args:
        open_engine: opens a worker's engine; its bundle is at the same path on every machine.
        workers: how many actors.
        keep_images: whether outcomes hold the frames, for pictures of them.
        cpus, gpus: what one actor takes.

    Raises:
        ConfigError: the cluster has not as much.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], workers: int, keep_images: bool = False, cpus: int = 1, gpus: int = 0
    ) -> None:
        self._ray = _library()
        self.workers = workers
        have = self._ray.cluster_resources()
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if have.get(name, 0) < each * workers:
                raise ConfigError(
                    f"The cluster has {have.get(name, 0):g} {name}s; {workers} processes take {each * workers}.",
                    "They would wait for ever.",
                    "fewer --processes or --threads, or more machines",
                )
        self._kind = self._ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        self._arguments = (open_engine, keep_images)
        self._start()

    def _start(self) -> None:
        self._actors = [self._kind.remote(*self._arguments) for _ in range(self.workers)]
        self._turn = itertools.cycle(self._actors)

    def submit(self, source: Source) -> Any:
        """See `Pool`."""
        return next(self._turn).score.remote(source)

    def result(self, begun: Any) -> list[Outcome]:
        """See `Pool`."""
        failures = self._ray.exceptions
        try:
            found: list[Outcome] = self._ray.get(begun)
            return found
        except failures.RayTaskError as error:
            if isinstance(error.cause, SaaeError):
                raise error.cause from None
            raise
        except (failures.RayActorError, failures.ObjectLostError, failures.OutOfMemoryError) as error:
            raise WorkerDied from error

    def restart(self) -> None:
        """See `Pool`."""
        self.close()
        self._start()

    def close(self) -> None:
        """See `Pool`."""
        for actor in self._actors:
            with suppress(Exception):
                self._ray.kill(actor, no_restart=True)
