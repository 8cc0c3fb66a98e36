"""`saae-line recalibrate`: thresholds from confirmed parts, and which parts would change their verdict."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import ConfigError
from ...files import open_regular
from ...terminal import log
from ..config import LineConfig, load_config
from ..http.options import HttpOptions
from ..in_force import InForce
from ..recalibrate import changed_parts, good_parts, recalibrate
from ..recipes import RecipeBook
from ..sinks import KINDS
from ..sinks.lines import JsonlOptions
from ..sinks.sqlite import SqliteOptions
from ..wiring import SECTIONS

__all__ = ["recalibrate_command", "recorded"]

_TAIL = 64 << 20  # bytes that are read from the end of a file of records
_SHOWN = 20
_COLUMNS = ("part_id", "station", "time", "score", "verdict", "reason", "recipe", "bundle")


def recalibrate_command(
    file: Annotated[Path, typer.Argument(help="The line.toml.")] = Path("line.toml"),
    recipe: Annotated[str | None, typer.Option(help="Recipe; needed if there are several.")] = None,
    normal: Annotated[
        list[Path] | None, typer.Option(help="Further folders of images of good parts. May be repeated.")
    ] = None,
    archive: Annotated[
        bool, typer.Option("--archive/--no-archive", help="Whether to use the archive's OK images as well.")
    ] = True,
    last: Annotated[int, typer.Option(help="Number of the latest recorded parts to compare.")] = 1000,
    write: Annotated[
        bool, typer.Option("--write", help="Write the new version; without it, nothing is written.")
    ] = False,
) -> None:
    """Compute thresholds from the parts that people confirmed as good, and show what would change.

    The bundle stays as it is; `--write` puts a new version beside it, NAME.recal-1 and so on. A running line
    switches to it, and back, without a stop: on the page, or by POST /v1/bundle.
    """
    config = load_config(file, KINDS, SECTIONS)
    name = _chosen(config, recipe)
    options = config.extra.get("http") or HttpOptions()
    folder = config.place(options.folder)
    good = good_parts(config, folder, name, archive, normal or [])
    console = log()
    book = RecipeBook([config.recipe(name)], config.path.parent)
    try:
        changes, problems = InForce(folder / "in-force.json", config).read()
        if name in changes:
            book.change(name, **changes[name])
        if name in problems:
            console.print(f"note: a change made on the page is ignored: {escape(problems[name])}", style="yellow")
        found = book.get(name)
        bundle = config.place(found.config.bundle)
        result = recalibrate(bundle, found, good, dry_run=not write)
        parts, source = recorded(config, name, found.bundle, last)
    finally:
        book.close()
    judged, changed = changed_parts(parts, result.after)
    table = Table(title=f"Recipe {name}, {result.pictures} images of good parts", title_justify="left")
    for heading in ("threshold", "in force", "new"):
        table.add_column(heading, justify="left" if heading == "threshold" else "right")
    table.add_row("images", f"{result.before:.5g}", f"{result.after:.5g}")
    table.add_row("pixels", f"{result.pixel_before:.5g}", f"{result.pixel_after:.5g}")
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    out.print(f"{len(changed)} of the last {judged} parts ({escape(source)}) would change their verdict")
    for item in changed[:_SHOWN]:
        words = f"{item['time']} {item['station']} {item['part_id']}: {item['verdict']} -> {item['would_be']}"
        out.print(f"  {escape(words)} (score {item['score']:.5g})")
    if len(changed) > _SHOWN:
        out.print(f"  and {len(changed) - _SHOWN} more")
    for line in result.said.splitlines():
        if line.startswith("note:"):
            console.print(escape(line), style="yellow", soft_wrap=True)
    out.print("Nothing was written." if result.written is None else f"written: {result.written}")


def _chosen(config: LineConfig, recipe: str | None) -> str:
    names = [item.name for item in config.recipes]
    if recipe is None and len(names) == 1:
        return names[0]
    if recipe not in names:
        what = "There are several recipes." if recipe is None else f"No recipe is named {recipe}."
        raise ConfigError(what, "", f"--recipe {names[0]}; there are {', '.join(names)}")
    return recipe


def recorded(config: LineConfig, recipe: str, bundle: str, last: int) -> tuple[list[dict[str, Any]], str]:
    """The latest parts of a recipe and bundle in the line's records, and where they were read.

    Args:
        config: of line.toml; its first `sqlite` or `jsonl` sink is read.
        recipe: the recipe's name.
        bundle: the bundle's hash: scores of other bundles cannot be compared.
        last: largest number of parts.
    """
    for sink in config.sinks:
        if isinstance(sink.options, SqliteOptions):
            path = config.place(sink.options.path)
            return (_from_sqlite(path, recipe, bundle, last) if path.is_file() else []), path.name
        if isinstance(sink.options, JsonlOptions):
            path = config.place(sink.options.path)
            return (_from_lines(path, recipe, bundle, last) if path.is_file() else []), path.name
    return [], "no sink of this line can be read"


def _from_sqlite(path: Path, recipe: str, bundle: str, last: int) -> list[dict[str, Any]]:
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)) as database:
            rows = database.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM parts WHERE recipe = ? AND bundle = ? ORDER BY time DESC LIMIT ?",
                (recipe, bundle, last),
            ).fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read.", str(error), "") from error
    return [dict(zip(_COLUMNS, row, strict=True)) for row in rows]


def _from_lines(path: Path, recipe: str, bundle: str, last: int) -> list[dict[str, Any]]:
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL))
        lines = stream.read(_TAIL).splitlines()
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        if len(found) >= last:
            break
        try:
            record = json.loads(line)
            if record["type"] == "part" and record["recipe"] == recipe and record["bundle"] == bundle:
                found.append({key: record[key] for key in _COLUMNS})
        except (ValueError, KeyError, TypeError):  # an incomplete first line
            continue
    return found
