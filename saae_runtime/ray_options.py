"""The options `--ray` and `--ray-address`, the same for every command that can run on a Ray cluster."""

from __future__ import annotations

import os
from typing import Annotated

import typer

__all__ = ["OnRay", "RayAddress", "asked_cluster"]

OnRay = Annotated[
    bool,
    typer.Option(
        "--ray", help="Run the processes on a Ray cluster. Files and folders must have the same paths on its machines."
    ),
]

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="The cluster for --ray, which this implies: auto (the one that this machine is part of), HOST:PORT, or "
        "local (one is started here, for this run). Default: RAY_ADDRESS, else auto.",
        show_default=False,
    ),
]


def asked_cluster(ray: bool, address: str | None) -> str | None:
    """The address of the cluster that the two options ask for, or None: no cluster.

    RAY_ADDRESS alone asks for none: on a machine of a cluster it may be set for every program.
    """
    if not ray and address is None:
        return None
    return address or os.environ.get("RAY_ADDRESS") or "auto"
