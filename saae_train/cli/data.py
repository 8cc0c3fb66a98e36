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
from saae_runtime.images import check_white_level
from saae_runtime.terminal import LineCommand

from ..data.category import Category, find_category, from_folders
from ..data.check import Report, check
from ..data.demo import DEMO_CATEGORIES, write_demo
from ..data.fetch import LICENCE, fetch_mvtec

__all__ = ["app", "print_report"]

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


@app.command(cls=LineCommand)
def fetch(
    category: Annotated[
        str, typer.Argument(help="Category of MVTec AD, such as zipper, or all (5.3 GB).", show_default=False)
    ],
    into: Annotated[
        Path, typer.Option("--into", "--data", help="Folder of categories, in which this one is written.")
    ] = Path("data"),
    accept_license: Annotated[
        bool,
        typer.Option(
            "--accept-license", help="I have read and accept the licence, CC BY-NC-SA 4.0 (no commercial use)."
        ),
    ] = False,
    archive: Annotated[Path | None, typer.Option(help="Archive that was downloaded by hand.")] = None,
    url: Annotated[str | None, typer.Option(help="Address of the archive, if the publisher has moved it.")] = None,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that the archive must have.")] = None,
    keep_archive: Annotated[bool, typer.Option("--keep-archive", help="Keep the archive after unpacking.")] = False,
) -> None:
    """Download MVTec AD from its publisher. An interrupted download resumes where it stopped."""
    if accept_license:  # otherwise the error shows it
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


@app.command(cls=LineCommand)
def demo(
    category: Annotated[str, typer.Argument(help="What to draw: " + ", ".join(DEMO_CATEGORIES) + ".")] = "zipper",
    into: Annotated[
        Path, typer.Option("--into", "--data", help="Folder of categories, in which this one is written.")
    ] = Path("data"),
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for both.")] = "512x512",
    train: Annotated[int, typer.Option(min=1, metavar="N", help="Images of good parts to train on.")] = 60,
    test_good: Annotated[int, typer.Option(min=0, metavar="N", help="Images of good parts to test on.")] = 12,
    per_defect: Annotated[int, typer.Option(min=0, metavar="N", help="Test images of each type of defect.")] = 4,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Another seed draws other images.")] = 0,
) -> None:
    """Draw a synthetic category: images of a product, with and without defects, and exact masks."""
    with _steps(f"drawing {category}") as show:
        drawn = write_demo(into, category, _size(size), train, test_good, per_defect, seed, show)
    _print_category(drawn)


@app.command("check", cls=LineCommand)
def check_command(
    category: Annotated[
        str | None, typer.Argument(help="Name of the category, if the images are in the MVTec AD layout.")
    ] = None,
    data: Annotated[Path, typer.Option("--data", help="Folder of categories (MVTec AD layout).")] = Path("data"),
    normal: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder of normal images, in place of a category. May be repeated."),
    ] = None,
    abnormal: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="With --normal: folder of defective images. May be repeated."),
    ] = None,
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="Folder of the masks of --abnormal; repeated as often and in the same order."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the headers of the files.")] = False,
    white_level: Annotated[
        int | None,
        typer.Option(metavar="N", help="White of 16-bit images, e.g. 4095 for a 12-bit camera. Default: 65535."),
    ] = None,
) -> None:
    """Open every image and mask, and list all problems. Exit code 1: something cannot be used."""
    if (category is None) == (not normal) or (category is not None and (abnormal or masks)):
        raise ConfigError(
            "It is not clear which images to check.",
            "Name either a category or your own folders (--normal, with --abnormal and --masks), not both.",
            "saae-train check zipper --data data   or   saae-train check --normal FOLDER",
        )
    found = find_category(data, category) if category is not None else from_folders(normal or (), abnormal, masks)
    found = found.with_white_level(check_white_level(white_level))
    with _steps(f"checking {found.name}") as show:
        report = check(found, deep=not quick, progress=show)
    print_report(report, Console())
    _print_category(found)
    if not report.ok:
        raise typer.Exit(1)


def print_report(report: Report, console: Console) -> None:
    """Print a validation report as a table, or one line if all is well."""
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
    typer.echo(f"layout: {category.layout}")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) in (1, 2) and all(part.strip().isdigit() for part in parts):
        numbers = [int(part) for part in parts]
        return numbers[0], numbers[-1]
    raise ConfigError(f"{text!r} is not a size.", "A size is height x width in pixels.", "write e.g. --size 512x512")
