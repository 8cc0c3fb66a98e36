"""`saae-train tables`: the paper's tables from one command, ours beside the published figures."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from saae_runtime.errors import DataError
from saae_runtime.files import canonical_json, sha256_bytes, write_json, write_text
from saae_runtime.ray_options import OnRay, RayAddress, asked_cluster
from saae_runtime.terminal import LineCommand, log
from saae_runtime.version import saae_version

from ..config import FitConfig, preset
from ..data.category import find_category, list_categories
from ..evaluation.ranking import METRIC_NAMES
from ..experiments.experiment import Experiment, tools
from ..experiments.jobs import Workers
from ..experiments.plan import (
    COLUMNS,
    TABLES,
    Plan,
    PlannedRun,
    ResultFolder,
    RunResult,
    known_categories,
    resolved,
    run_plan,
)
from ..experiments.tables import Table, csv_text, fps_table, make_tables, markdown, measured_with, versions_text
from .options import make_config, parse_changes, parse_seeds
from .workers import Board, FitsAtOnce, opened_workers

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The paper's tables.")

_FPS = "fps"


@app.command(cls=LineCommand)
def tables(
    data: Annotated[Path, typer.Option(help="Folder of categories (MVTec AD layout).", show_default=False)],
    categories: Annotated[
        str, typer.Option(metavar="X[,Y]", help="Names of categories. Default: all in --data.", show_default=False)
    ] = "",
    table: Annotated[
        str, typer.Option(metavar="X[,Y]", help="Some of 2, 3, 4, 5, fps. Default: all.", show_default=False)
    ] = "",
    columns: Annotated[
        str,
        typer.Option(
            metavar="X[,Y]",
            help="Columns of the tables, e.g. Ours,DFR or f4,f5. Default: the paper's.",
            show_default=False,
        ),
    ] = "",
    preset_name: Annotated[
        str, typer.Option("--preset", help="Preset of the column Ours, which the others change.")
    ] = "paper",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A field of the configuration, e.g. epochs=100. May be repeated.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Of the backbone: a file, cache, hub or packaged. Default: the first one found."),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="N[,N]", help="Several give mean and standard deviation. Default: one.", show_default=False
        ),
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: a GPU if there is one.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for tables.md, tables.csv, tables.json and the experiments.")
    ] = Path("runs/tables"),
    processes: FitsAtOnce = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be run, and run nothing.")] = False,
) -> None:
    """Reproduce the paper's Tables 2 to 5 and its speed, and print our figures beside the paper's.

    Each result is saved in a file of its own: a stopped run resumes where it stopped, and nothing runs twice.
    """
    wanted = _words(table) or [*TABLES, _FPS]
    config = make_config(preset_name, fixed=parse_changes(change or []))
    names = known_categories(_words(categories) or list_categories(data))
    if not names:
        raise DataError(f"{data} holds no category.", "No folder in it has a folder `train`.", "give an MVTec AD tree")
    for name in _words(categories):
        find_category(data, name)
    plan = Plan.make(
        data,
        names,
        config,
        tables=[name for name in wanted if name != _FPS],
        columns=_words(columns),
        seeds=parse_seeds(seeds),
        weights=weights,
        device=device,
    )
    folder = ResultFolder(out, data)
    if dry_run:
        _list(plan, folder, _FPS in wanted)
        return
    results: dict[tuple[str, str, int], RunResult] = {}
    made: list[Table] = []
    speeds: dict[str, Any] | None = None
    with opened_workers(processes, asked_cluster(ray, ray_address), device) as workers:
        try:
            _run(plan, folder, results, workers)
            if _FPS in wanted:
                made.append(fps_table(speeds := _fps(folder, config, data, names, device)))
        finally:  # after Ctrl-C, too: show what is finished and what is missing
            made = make_tables(plan, results) + made
            _write(made, out, _measured(results, speeds))
            _print(made)
            log().print(f"Written: {out}/tables.md, tables.csv, tables.json", markup=False)
    if any(figure.ours is None for shown in made for figure in shown.figures.values()):
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _run(plan: Plan, folder: ResultFolder, results: dict[tuple[str, str, int], RunResult], workers: Workers) -> None:
    there = 0
    with Board(log(), "experiments", len(plan.runs)) as board:

        def done(planned: PlannedRun, result: RunResult, fresh: bool) -> None:
            nonlocal there
            board.done(planned)
            if result.row is None:
                board.say(f"{planned.title}: {result.reason}", "yellow")
            elif fresh:
                board.say(f"{planned.title}: {_figures(result.row)}")
            else:
                there += 1

        run_plan(
            plan,
            folder,
            workers=workers,
            started=lambda planned: board.started(planned, planned.title),
            report=board.report,
            died=board.died,
            done=done,
            results=results,
        )
        if there:
            board.say(f"{there} of {len(plan.runs)} experiments were there already.")


def _figures(row: Any) -> str:
    found = []
    for key in ("pixel_roc_auc", "pro_auc"):
        value = row["overall"]["metrics"][key]["value"]
        found.append(f"{METRIC_NAMES[key]} {'-' if value is None else f'{100 * value:.2f}'}")
    return f"{', '.join(found)} ({row['fit_seconds'] + row['evaluate_seconds']:.0f} s)"


def _fps(
    folder: ResultFolder, config: FitConfig, data: Path, names: tuple[str, ...], device: str | None
) -> dict[str, Any]:
    """The speeds, from a file if the same models were measured on the same device before."""
    from ..experiments.speed import measure_fps
    from ..fitting.features import pick_device

    configs = {"SAAE": config, "DFR": preset("paper").replace(**COLUMNS["DFR"])}
    models = {name: c.to_json() for name, c in configs.items()}
    settings = {"device": str(pick_device(device)), "models": models, "saae": saae_version()}
    file = f"fps-{sha256_bytes(canonical_json(settings).encode())[:16]}.json"
    try:
        kept = folder.read(file)["measured"]
        if all("fps" in model for model in kept["models"].values()):
            return dict(kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log().print("frames a second of SAAE and DFR ...")
    measured = {**measure_fps(configs, find_category(data, names[0]).train, device), "tools": tools()}
    write_json(folder.path(file), {"settings": settings, "measured": measured})
    return measured


def _list(plan: Plan, folder: ResultFolder, fps: bool) -> None:
    """Print what a run would do, as a table."""
    shown = RichTable(title="Experiments to run", title_justify="left")
    for name in ("column", "model", "schedule", "to run", "there"):
        shown.add_column(name)
    results: dict[tuple[str, str, int], RunResult] = {}
    columns: dict[str, list[PlannedRun]] = {}
    seconds: list[float] = []
    waiting: dict[str, list[str]] = {}
    seen: dict[Experiment, str] = {}
    for planned in plan.runs:
        config = planned.experiment.config
        if planned.v_from is None and seen.setdefault(planned.experiment, planned.column) != planned.column:
            continue  # the same experiment under another name
        columns.setdefault(planned.column, []).append(planned)
        experiment = resolved(planned, results)
        found = None if isinstance(experiment, str) else folder.find(experiment)
        if found is not None:
            results[planned.experiment.category, planned.column, config.seed] = found
        if found is not None and found.row is not None:
            seconds.append(found.row["fit_seconds"] + found.row["evaluate_seconds"])
        else:
            again = "" if found is None else f" (again; {found.reason})"
            waiting.setdefault(planned.column, []).append(planned.experiment.category + again)
    for name, experiments in columns.items():
        config = experiments[0].experiment.config
        layers = " ".join(map(str, config.layers or ()))
        model = f"{config.backbone}, layers {layers}, {'SAAE' if config.transformer else 'CAE'}"
        if experiments[0].v_from is not None:
            model += f", V of {experiments[0].v_from}"
        length = f"{config.steps} steps" if config.steps is not None else f"{config.epochs} epochs"
        to_run = list(dict.fromkeys(waiting.get(name, ())))
        there = str(len(experiments) - len(waiting.get(name, ())))
        shown.add_row(name, model, f"{length} of {config.batch}", escape(", ".join(to_run)), there)
    console = Console()
    console.print(shown)
    missing = sum(map(len, waiting.values()))
    text = f"{missing} of {sum(map(len, columns.values()))} experiments to run"
    if seconds and missing:
        minutes = missing * sum(seconds) / len(seconds) / 60
        text += f", about {minutes:.0f} minutes at the pace of the {len(seconds)} that are there"
    console.print(text + (", and the frames a second." if fps else "."), highlight=False)


def _measured(
    results: dict[tuple[str, str, int], RunResult], speeds: dict[str, Any] | None
) -> list[tuple[dict[str, str], list[str]]]:
    """Versions, and the experiments that were measured with them, including the frames a second."""
    found = measured_with(results)
    if speeds is not None:
        same = next((experiments for versions, experiments in found if versions == speeds.get("tools", {})), None)
        if same is None:
            found.append((speeds.get("tools", {}), same := []))
        same.append("frames a second")
    return found


def _write(made: list[Table], out: Path, measured: list[tuple[dict[str, str], list[str]]]) -> None:
    line = ["saae-train", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])]
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    origin = f"{when[:10]}, `{shlex.join(line)}`; measured with {versions_text(measured)}"
    write_text(out / "tables.md", markdown(made, origin))
    write_text(out / "tables.csv", csv_text(made))
    write_json(
        out / "tables.json",
        {
            "created": when,
            "command": shlex.join(line),
            "versions": [{"tools": found, "cells": experiments} for found, experiments in measured],
            "tables": [table.to_json() for table in made],
        },
    )


def _print(made: list[Table]) -> None:
    console = Console()
    for table in made:
        heads, rows, notes = table.grid()
        shown = RichTable(title=table.title, title_justify="left")
        for index, head in enumerate(heads):
            shown.add_column(escape(head), justify="left" if index == 0 else "right")
        for row in rows:
            if row[0].startswith("mean"):
                shown.add_section()
            shown.add_row(*map(escape, row))
        console.print(shown)
        if len(table.columns) > 2:
            console.print("In brackets: the paper's figure, and the difference.", style="dim")
        for line in (*(f"[{number}] {note}" for number, note in enumerate(notes, start=1)), *table.setup):
            console.print(line, style="dim", markup=False, highlight=False)
        console.print()
