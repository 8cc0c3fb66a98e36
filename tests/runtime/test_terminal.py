"""Options given twice, help that is wrapped to the terminal, and stages in a log file."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from saae_runtime.terminal import LineCommand, Stages, command_group, run_command

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


def _lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120, highlight=False)


def test_a_stage_counts_one_thing_after_another(console: Console) -> None:
    stages = Stages(console, 2)
    with stages.stage("fit") as stage:
        for done in range(21):
            stage(done, 20, "images")
        for done in range(101):
            stage(done, 100, "steps")
        stage.note("done well")
    lines = _lines(console)
    assert lines[0] == "1/2 fit ..."
    assert sum("images" in line for line in lines) == 9
    assert sum("steps" in line for line in lines) == 9
    assert lines[-1].startswith("1/2 fit: done well (")


def test_a_stage_that_fails_has_no_closing_line(console: Console) -> None:
    stages = Stages(console, 1)
    with pytest.raises(KeyboardInterrupt), stages.stage("fit"):
        raise KeyboardInterrupt
    assert _lines(console) == ["1/1 fit ..."]


def test_brackets_in_names_are_text(console: Console) -> None:
    stages = Stages(console, 1)
    stages.say("[red]file[/red].png")
    with stages.stage("check [a]") as stage:
        stage.note("[b]")
    text = "\n".join(_lines(console))
    assert "[red]file[/red].png" in text
    assert "check [a]: [b]" in text


def test_a_file_name_that_is_no_utf_8_is_printed_with_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", out)
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_command(lambda prog_name: print(os.fsdecode(b"teil_\xe4.png")), "x")  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before)
    out.flush()
    assert out.buffer.getvalue() == b"teil_\\udce4.png\n"  # type: ignore[attr-defined]
