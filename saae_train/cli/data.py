"""The data commands of `saae-train`: fetch MVTec AD, draw the demo, check images. They parse, call and print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from saae_runtime.errors import ConfigError

from ..data.category import Category, find_category, from_folders
from ..data.check import Report, check
from ..data.demo import DEMO_CATEGORIES, write_demo
from ..data.fetch import LICENCE, fetch_mvtec

app = typer.Typer(no_args_is_help=True, help="Get, draw and check images.")

_err = Console(stderr=True)
_STAGES = {"download": "downloading", "check": "checking the hash", "unpack": "unpacking"}


@contextmanager
def _steps(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields the callback (done, all)."""
    columns = (TextColumn(escape(title)), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def fetch(
    category: Annotated[str, typer.Argument(help='A category of MVTec AD, such as zipper, or "all" (5.3 GB).')],
    into: Annotated[Path, typer.Option("--into", "--data", help="Folder that holds the categories.")] = Path("data"),
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="I have read and accept CC BY-NC-SA 4.0 (no commercial use).")
    ] = False,
    archive: Annotated[Path | None, typer.Option(help="Use this archive, downloaded by hand.")] = None,
    url: Annotated[str | None, typer.Option(help="Take the archive from here, if the publisher moved it.")] = None,
    sha256: Annotated[str | None, typer.Option(help="What the archive must hash to.")] = None,
    keep_archive: Annotated[bool, typer.Option("--keep-archive", help="Do not delete the archive.")] = False,
) -> None:
    """Get MVTec AD from its publisher. Interrupted downloads go on where they stopped."""
    if accept_license:  # otherwise the refusal shows it
        typer.echo(LICENCE, err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        tasks = {stage: bar.add_task(text, total=None, visible=False) for stage, text in _STAGES.items()}

        def show(stage: str, done: int, total: int) -> None:
            bar.update(tasks[stage], completed=done, total=total or None, visible=True)

        found = fetch_mvtec(
            category,
            into,
            accept_license,
            archive=archive,
            url=url,
            sha256=sha256,
            keep_archive=keep_archive,
            progress=show,
        )
    for item in found:
        _print_category(item)


@app.command()
def demo(
    category: Annotated[str, typer.Argument(help="What to draw: " + ", ".join(DEMO_CATEGORIES) + ".")] = "zipper",
    into: Annotated[Path, typer.Option("--into", "--data", help="Folder that holds the categories.")] = Path("data"),
    size: Annotated[str, typer.Option(help="Height x width in pixels, or one number.")] = "512x512",
    train: Annotated[int, typer.Option(min=1, help="Flawless pictures for training.")] = 60,
    test_good: Annotated[int, typer.Option(min=0, help="Flawless pictures for testing.")] = 12,
    per_defect: Annotated[int, typer.Option(min=0, help="Damaged pictures of each defect type.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other pictures.")] = 0,
) -> None:
    """Draw a synthetic category: a product with defects and exact masks, made without any camera."""
    with _steps(f"drawing {category}") as show:
        drawn = write_demo(into, category, _size(size), train, test_good, per_defect, seed, show)
    _print_category(drawn)


@app.command("check")
def check_command(
    category: Annotated[str | None, typer.Argument(help="The category, if the images lie in an MVTec AD tree.")] = None,
    data: Annotated[Path, typer.Option("--data", help="Folder that holds the categories.")] = Path("data"),
    normal: Annotated[Path | None, typer.Option(help="Instead of a category: folder of normal images.")] = None,
    abnormal: Annotated[Path | None, typer.Option(help="Folder of defective images.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of their masks.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read the files' headers only.")] = False,
) -> None:
    """Open every image and list all that is wrong. Exit code 1 if anything is unusable."""
    if (category is None) == (normal is None):
        raise ConfigError(
            "It is not clear which images to check.",
            "Either a category or a folder of normal images is needed, not both.",
            "saae-train check zipper --data data   or   saae-train check --normal FOLDER",
        )
    found = find_category(data, category) if category is not None else from_folders(normal or "", abnormal, masks)
    with _steps(f"checking {found.name}") as show:
        report = check(found, deep=not quick, progress=show)
    print_report(report, Console())
    _print_category(found)
    if not report.ok:
        raise typer.Exit(1)


def print_report(report: Report, console: Console) -> None:
    """Prints a validation report as a table; nothing but one line when all is well."""
    if report.problems or report.warnings:
        table = Table(
            "", "file", "what", title=escape(f"{report.category}: {report.images} images"), title_justify="left"
        )
        for label, style, rows in (("problem", "red", report.problems), ("warning", "yellow", report.warnings)):
            for row in rows:
                table.add_row(f"[{style}]{label}[/]", escape(str(row.path)), escape(row.what))
        console.print(table)
    counts = f"{len(report.problems)} problems, {len(report.warnings)} warnings in {report.images} images"
    console.print(counts if not report.ok else escape(f"all images of {report.category} can be used ({counts})"))


def _print_category(category: Category) -> None:
    good = sum(not sample.is_anomalous for sample in category.test)
    synthetic = " (synthetic, drawn by saae)" if category.synthetic else ""
    typer.echo(
        f"{category.root}{synthetic}: {len(category.train)} normal images to train on, {good} normal and "
        f"{len(category.test) - good} defective ones to test on"
    )


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) in (1, 2) and all(part.strip().isdigit() for part in parts):
        numbers = [int(part) for part in parts]
        return numbers[0], numbers[-1]
    raise ConfigError(f"{text!r} is not a size.", "A size is height x width in pixels.", "write e.g. --size 512x512")
