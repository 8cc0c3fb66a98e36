"""`saae-train fit-many`: a checkpoint for each category of a folder, several at once or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from saae_runtime.errors import DataError, SaaeError
from saae_runtime.ray_options import OnRay, RayAddress, asked_cluster
from saae_runtime.terminal import LineCommand, log

from ..data.category import find_category, list_categories
from ..experiments.experiment import Experiment
from ..experiments.many import CategoryFit, fit_many
from .options import Cache, FitOptions, expand_options
from .workers import Board, FitsAtOnce, opened_workers

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Fit many categories.")


@app.command("fit-many", cls=LineCommand)
@expand_options
def fit_many_command(
    *,
    data: Annotated[
        Path,
        typer.Option(rich_help_panel="Images", help="Folder of categories (MVTec AD layout).", show_default=False),
    ],
    categories: Annotated[
        str,
        typer.Option(
            metavar="X[,Y]",
            rich_help_panel="Images",
            help="Names of categories. Default: all in --data.",
            show_default=False,
        ),
    ] = "",
    options: FitOptions,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", rich_help_panel="Places", help="Folder; checkpoints are in CATEGORY/checkpoint."),
    ] = Path("runs"),
    cache: Cache = None,
    processes: FitsAtOnce = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
) -> None:
    """Fit a model to each category and save its checkpoint, as `fit` does for one.

    A category that has a checkpoint of the same images and settings is not fitted again; a stopped run
    resumes. Exit code 1 if a category failed.
    """
    config = options.config()
    names = list(dict.fromkeys(word.strip() for word in categories.split(",") if word.strip()))
    for name in names:
        find_category(data, name)
    names = names or list_categories(data)
    if not names:
        raise DataError(f"{data} holds no category.", "No folder in it has a folder `train`.", "give an MVTec AD tree")
    kept = None if cache is None else str(cache)
    fits = [
        CategoryFit(
            Experiment(str(data), name, config, weights=options.weights, cache=kept, device=options.device),
            str(out),
            options.texture,
        )
        for name in names
    ]
    there = 0
    with (
        opened_workers(processes, asked_cluster(ray, ray_address), options.device) as workers,
        Board(log(), "categories", len(fits)) as board,
    ):

        def done(name: str, outcome: Mapping[str, Any] | SaaeError, fresh: bool) -> None:
            nonlocal there
            board.done(name)
            if isinstance(outcome, SaaeError):
                board.say(f"{name}: {' '.join(part for part in (outcome.what, outcome.why) if part)}", "yellow")
            elif fresh:
                board.say(f"{name}: {outcome['images']} images, {outcome['seconds']:.0f} s")
                for warning in outcome["warnings"][:5]:
                    board.say(f"  note: {warning}", "yellow")
            else:
                there += 1

        found = fit_many(
            fits,
            workers,
            started=lambda name: board.started(name, name),
            report=board.report,
            died=board.died,
            done=done,
        )
        if there:
            board.say(f"{there} of {len(fits)} checkpoints were there already.")
    for name, outcome in found.items():
        if not isinstance(outcome, SaaeError):
            Console().print(str(out / name / "checkpoint"), markup=False, highlight=False, soft_wrap=True)
    if any(isinstance(outcome, SaaeError) for outcome in found.values()):
        raise typer.Exit(1)
