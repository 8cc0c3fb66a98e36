"""Workers on a Ray cluster: actors, each with an engine, on machines that see the same files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..cluster import WorkerDied, deaths, library, shares
from ..engine import Engine
from ..errors import SaaeError
from ..sources.files import Source
from .pool import score_source
from .scoring import Outcome

__all__ = ["RayPool"]


class _Worker:
    """The state of one actor."""

    def __init__(self, open_engine: Callable[[], Engine], keep_images: bool) -> None:
        self._keep_images = keep_images
        self._failed: SaaeError | None = None
        try:
            self._engine = open_engine()
        except SaaeError as error:  # an exception here would only be reported as a dead actor
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
        cpus, gpus: of one actor.

    Raises:
        ConfigError: the cluster is too small.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], workers: int, keep_images: bool = False, cpus: int = 1, gpus: int = 0
    ) -> None:
        self._ray = library()
        self.workers = workers
        shares(workers, gpus, cpus)
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
        try:
            found: list[Outcome] = self._ray.get(begun)
            return found
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SaaeError):
                raise error.cause from None
            raise
        except deaths() as error:
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
