"""Options given twice, and help that is wrapped to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from saae_runtime.terminal import LineCommand, command_group

runner = CliRunner()


def _app() -> typer.Typer:
    app = command_group("About.")

    @app.command("go", cls=LineCommand)
    def go(
        words: Annotated[list[str] | None, typer.Argument()] = None,
        rate: Annotated[float, typer.Option("--rate", "-r")] = 0.5,
        folder: Annotated[list[Path] | None, typer.Option("--folder")] = None,
        fast: Annotated[bool, typer.Option("--fast/--slow")] = False,
    ) -> None:
        """First line
        goes on.

        Second paragraph
        goes on.
        """
        print(words, rate, [str(item) for item in folder or ()], fast)

    @app.command("other", cls=LineCommand)
    def other() -> None:
        """Another one."""

    return app


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--rate", "0.1", "--rate", "0.2"], "--rate"),
        (["--rate", "0.1", "-r", "0.1"], "--rate"),
        (["--rate=0.1", "word", "--rate=0.1"], "--rate"),
        (["--fast", "--slow"], "--fast"),
    ],
)
def test_an_option_given_twice_is_named(arguments: list[str], option: str) -> None:
    done = runner.invoke(_app(), ["go", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert option in done.output
    assert "given more than once" in done.output


def test_what_collects_values_takes_all_of_them() -> None:
    done = runner.invoke(_app(), ["go", "a", "b", "--folder", "x", "--rate", "0.1", "--folder", "y", "--fast"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == "['a', 'b'] 0.1 ['x', 'y'] True"


def test_an_option_of_the_group_given_twice_is_named() -> None:
    done = runner.invoke(_app(), ["--debug", "--debug", "go"])
    assert done.exit_code == 2
    assert "--debug" in done.output


def test_help_answers_whatever_else_is_there() -> None:
    done = runner.invoke(_app(), ["go", "--fast", "--fast", "--help"])
    assert done.exit_code == 0
    assert "First line goes on." in done.output
    assert "Second paragraph goes on." in done.output
