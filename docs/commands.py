"""Writes the reference of the four commands from their help: python docs/commands.py [FILE]."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from saae_runtime.files import write_text  # noqa: E402

COMMANDS = {
    "saae-run": "saae_runtime.cli.command",
    "saae-line": "saae_runtime.line.cli.command",
    "saae-export": "saae_export.cli.command",
    "saae-train": "saae_train.cli.command",
}
"""Each command and the module with its `app`."""

_HEAD = """# Commands

The `--help` of each command.
"""


def pages(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield each command with the words that call it; groups of commands are skipped."""
    within = getattr(command, "commands", {})
    if not within:
        yield name, command
    for word, part in within.items():
        yield from pages(f"{name} {word}", part)


def cell(text: str) -> str:
    """One line of text for a table's cell, without the terminal's markup."""
    plain = re.sub(r"\[/?(?:bold|dim|italic|cyan|yellow|red|green)\]", "", text)
    return " ".join(plain.split()).replace("|", "\\|")


def section(name: str, command: Any) -> str:
    """Write a command's heading, help and usage, and a table of its arguments and options."""
    context = typer.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    records = [item.get_help_record(context) for item in command.params]
    rows = [f"| `{cell(names)}` | {cell(told).replace('<', '&lt;')} |" for names, told in filter(None, records)]
    what = inspect.cleandoc(command.help or "").replace("\b\n", "")
    return "\n".join(
        [f"## {name}", "", what, "", "```text", usage, "```", "", "| typed | what it does |", "|---|---|", *rows, ""]
    )


def text() -> str:
    """The whole page."""
    sections = [
        section(*page)
        for name, module in COMMANDS.items()
        for page in pages(name, typer.main.get_command(importlib.import_module(module).app))
    ]
    return "\n".join([_HEAD, *sections])


def main(file: Annotated[Path, typer.Argument(help="the page")] = ROOT / "docs/reference/commands.md") -> None:
    """Write the reference of all commands."""
    write_text(file, text())


if __name__ == "__main__":
    typer.run(main)
