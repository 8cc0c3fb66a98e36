"""Stages in a log file: one line at the start, one at each tenth of every count, one at the end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from saae_runtime.stages import Stages


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
