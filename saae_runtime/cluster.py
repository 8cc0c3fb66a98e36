"""A Ray cluster: connecting to it, whether it has the room, and what a worker's death looks like there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import BackendUnavailableError, ConfigError

__all__ = ["WorkerDied", "check_room", "connected", "deaths", "library"]


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
            of), or `host:port`.

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
            f"--ray {address}: there is no cluster.",
            f"{type(error).__name__}: {error}",
            "ray start --head on one machine, or --ray local; without Ray: --processes",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_room(workers: int, cpus: int, gpus: int) -> None:
    """Refuse more workers than the cluster has room for; each takes so many CPUs and GPUs. Raise ConfigError."""
    have = library().cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if have.get(name, 0) < each * workers:
            raise ConfigError(
                f"The cluster has {have.get(name, 0):g} {name}s; {workers} processes take {each * workers}.",
                "They would wait for ever.",
                "fewer --processes or --threads, or more machines",
            )


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
