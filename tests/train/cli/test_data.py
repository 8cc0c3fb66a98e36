"""The data commands at the line: what they print, and their exit codes."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from saae_runtime.errors import ConfigError, DataError, FetchError
from saae_train.cli.data import app, print_report
from saae_train.data.check import Problem, Report

SMALL = ["--size", "64", "--train", "3", "--test-good", "1", "--per-defect", "1"]


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and what was printed; errors meant for a person are raised, as `saae-train` catches them."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert run("demo", "zipper", "--into", str(folder), *SMALL)[0] == 0
    return folder


def test_demo_draws_and_says_what(data: Path) -> None:
    code, text = run("demo", "zipper", "--data", str(data), *SMALL)
    assert code == 0
    assert "synthetic" in text
    assert "3 normal images to train on, 1 normal and 7 defective" in text


def test_check_passes_and_fails(data: Path, tmp_path: Path) -> None:
    code, text = run("check", "zipper", "--data", str(data))
    assert code == 0
    assert "0 problems" in text
    assert "layout: MVTec AD" in text
    ok = data / "zipper/train/good"
    assert run("check", "--normal", str(ok))[0] == 0
    for i, content in enumerate((b"", b"no picture")):
        (tmp_path / f"{i}.png").write_bytes(content)
    code, text = run("check", "--normal", str(tmp_path), "--quick")
    assert code == 1
    assert "2 problems, 0 warnings in 2 images" in text
    assert "is empty" in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    report = Report(
        "a[/b]",
        2,
        (Problem(Path("[red]bad[/].png"), "is not an image (cannot identify [/x])"),),
        (Problem(Path("[1].png"), "is odd"),),
    )
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    print_report(dataclasses.replace(report, problems=()), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in (
        "a[/b]: 2 images",
        "[red]bad[/].png",
        "cannot identify [/x]",
        "[1].png",
        "all images of a[/b] can be",
    ):
        assert words in text, words


def test_check_takes_several_folders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are looked at; the same one in two folders is pointed out, in training and test it is a problem."""
    monkeypatch.setenv("COLUMNS", "400")
    ok = data / "zipper/train/good"
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(ok / "000.png", again / "000.png")
    code, text = run("check", "--normal", str(ok), "--normal", str(again))
    assert code == 0
    assert "0 problems, 1 warnings in 4 images" in text
    assert "is the same image as" in text
    code, text = run(
        "check", "--normal", str(ok), "--abnormal", str(data / "zipper/test/rough"), "--abnormal", str(again)
    )
    assert code == 1
    assert "is the same image as the training image" in text
    with pytest.raises(DataError, match="is given twice"):
        run("check", "--normal", str(ok), "--normal", str(ok))


@pytest.mark.parametrize(
    "arguments", [("check",), ("check", "zipper", "--normal", "x"), ("check", "zipper", "--masks", "x")]
)
def test_check_needs_one_source(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="not clear"):
        run(*arguments)


def test_check_suggests_near_names(data: Path) -> None:
    with pytest.raises(DataError, match="did you mean zipper"):
        run("check", "ziper", "--data", str(data))


def test_fetch_shows_the_licence_and_wants_it_accepted(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="CC BY-NC-SA"):
        run("fetch", "zipper", "--into", str(tmp_path))
    with pytest.raises(FetchError, match="There is no archive"):
        run("fetch", "zipper", "--into", str(tmp_path), "--accept-license", "--archive", str(tmp_path / "gone.tar.xz"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["wide", "64x", "64x64x64", "-64"])
def test_demo_refuses_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        run("demo", "--into", str(tmp_path), f"--size={size}")
