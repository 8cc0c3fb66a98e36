"""A Ray cluster: connecting to it, whether it has the room, and what a worker's death looks like there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import BackendUnavailableError, ConfigError

__all__ = ["WorkerDied", "connected", "deaths", "library", "shares"]


class WorkerDied(Exception):
    """A worker, of a cluster or of this machine, ended at its work, or before."""


def library() -> Any:
    """The module `ray`. Raises BackendUnavailableError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report no usage of a production machine
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise BackendUnavailableError("--ray needs the package ray.", str(error), "pip install 'saae[ray]'") from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within the block this process is connected to a cluster; a program that already is stays so.

    Args:
        address: `local` (one is started here, and ended with the block), `auto` (the one that this machine is part
            of; where there is none, none is started: one machine would do the work of many), or `host:port`.

    Raises:
        BackendUnavailableError: ray is not installed, or no cluster answers.
    """
    ray = library()
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:  # ConnectionError, RuntimeError and its own, from release to release
        raise BackendUnavailableError(
            f"No Ray cluster was found ({address}).",
            f"{type(error).__name__}: {error}",
            "ray start (--head on one machine, --address HOST:PORT on the others), --ray-address HOST:PORT, or "
            "--ray-address local, which starts one here; without Ray: --processes N",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def shares(workers: int | None, gpus: int, cpus: int | None = None) -> tuple[int, int]:
    """How many workers the cluster gets, and how many CPUs each of them has.

    Args:
        workers: how many; None: one for each GPU if they take one, else one for each machine, or with `cpus` as many as
            there is room for.
        gpus: of each worker, 0 or 1.
        cpus: of each worker; None: as many as leave room for all workers.

    Raises:
        ConfigError: there is not so much room.
    """
    nodes = [node["Resources"] for node in library().nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def room(each: int) -> int:
        # on one machine each, or the last ones would wait for ever
        return sum(int(min(node["CPU"] // each, node.get("GPU", 0) // gpus if gpus else node["CPU"])) for node in nodes)

    total_cpus, total_gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
    if workers is None:
        workers = max(1, room(cpus) if cpus else total_gpus if gpus else len(nodes))
    if cpus is None:
        cpus = next((each for each in range(total_cpus // workers, 1, -1) if room(each) >= workers), 1)
    if room(cpus) < workers:
        raise ConfigError(
            f"The cluster has no room for {workers} processes of {cpus} CPUs and {gpus} GPUs.",
            f"It has {total_cpus} CPUs and {total_gpus} GPUs; those without a place would wait for ever.",
            "fewer --processes or --threads, or more machines",
        )
    return workers, cpus


def deaths() -> tuple[type[BaseException], ...]:
    """What `ray.get` raises where a worker, its machine, or what it gave is gone."""
    failures = library().exceptions
    return (
        failures.RayActorError,
        failures.WorkerCrashedError,
        failures.NodeDiedError,
        failures.ObjectLostError,
        failures.OutOfMemoryError,
    )
