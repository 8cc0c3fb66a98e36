"""`saae-train fit` and `evaluate` as a person types them, on a tiny drawn category and random weights."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from repeated_options import repeatable
from typer.testing import CliRunner

from saae_runtime.errors import ConfigError
from saae_train.cli.command import app
from saae_train.cli.options import make_config, parse_layers, parse_size
from saae_train.data.demo import write_demo

pytestmark = pytest.mark.needs("torch")

runner = CliRunner()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo(root, "zipper", size=(96, 96), train=8, test_good=2, per_defect=1)
    return root


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    arguments = ["fit", "--category", "zipper", "--data", str(data), "--out", str(folder / "checkpoint")]
    arguments += ["--backbone", "vit_tiny_patch16_224", "--weights", "random", "--input-size", "64", "--layers", "1-2"]
    arguments += ["--steps", "3", "--batch", "4", "--latent", "12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAAE_CACHE", str(folder / "cache"))
        result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder / "checkpoint"


def test_fit_writes_a_checkpoint_that_names_what_made_it(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())
    assert record["category"] == "zipper"
    assert record["config"]["layers"] == [1, 2]
    assert record["saae"]["latent"] == 12
    assert record["facts"]["synthetic"] is True
    assert len(record["facts"]["held_out"]) + record["facts"]["images"] == 8


def test_evaluate_measures_the_checkpoint(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "e")])
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert measured["synthetic"] is True
    assert 0.0 <= measured["overall"]["metrics"]["pixel_roc_auc"]["value"] <= 1.0
    assert (tmp_path / "e" / "sheet.png").stat().st_size > 1000
    for name in ("pixel-roc", "per-region-overlap", "pixel-precision-recall", "image-roc", "image-precision-recall"):
        assert (tmp_path / "e" / f"{name}.png").stat().st_size > 1000
        assert "</svg>" in (tmp_path / "e" / f"{name}.svg").read_text()
    assert "best F1" in (tmp_path / "e" / "pixel-precision-recall.svg").read_text()
    assert "30 %" in (tmp_path / "e" / "per-region-overlap.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit"], "Which images?"),
        (["fit", "--category", "ziper", "--data", "DATA"], "zipper"),
        (["fit", "--category", "zipper", "--data", "DATA", "--layers", "a"], "not a list of layers"),
        (["fit", "--category", "zipper", "--data", "DATA", "--preset", "slow"], "no preset"),
        (["evaluate", "nowhere", "--data", "DATA"], "No checkpoint"),
        (["fit", "--normal", "DATA", "--data", "DATA"], "--normal and --data are both given"),
        (["fit", "--normal", "DATA", "--normal", "DATA"], "is given twice"),
        (["fit", "--normal", "DATA", "--set", "step=3"], "did you mean steps (a whole number, 0 or more, or null)"),
        (["fit", "--normal", "DATA", "--set", "clip=wide"], "clip cannot be 'wide'. why: It is a number, more than 0"),
        (["fit", "--normal", "DATA", "--latent", "0"], "latent cannot be 0"),
    ],
)
def test_errors_say_what_to_type(arguments: list[str], words: str, data: Path) -> None:
    result = runner.invoke(app, [str(data) if item == "DATA" else item for item in arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_options_become_a_configuration() -> None:
    assert parse_layers("0,3-5") == (0, 3, 4, 5)
    assert parse_size("392") == (392, 392)
    assert parse_size("384x512") == (384, 512)
    with pytest.raises(ConfigError):
        parse_size("1x2x3")
    by_steps = make_config("paper", steps=7)
    assert (by_steps.steps, by_steps.epochs, by_steps.loss) == (7, None, "l2")
    by_epochs = make_config("fast", epochs=2)
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2)
    with pytest.raises(ConfigError):
        make_config("fast", steps=1, epochs=1)


def test_fit_takes_several_folders_and_names_them_in_the_next_command(tmp_path: Path) -> None:
    """Files of one name in both, a blank in the path, and the line that `fit` says to type."""
    for seed, shift in enumerate(("day shift", "night")):
        write_demo(tmp_path / shift, "zipper", size=(96, 96), train=4, test_good=0, per_defect=0, seed=seed)
    folders = [str(tmp_path / shift / "zipper" / "train" / "good") for shift in ("day shift", "night")]
    arguments = ["fit", "--normal", folders[0], "--normal", folders[1], "--category", "zip", "--out"]
    arguments += [str(tmp_path / "my model"), "--cache", str(tmp_path / "cache"), "--set", "held_out=0.4"]
    arguments += ["--backbone", "vit_tiny_patch16_224", "--weights", "random", "--input-size", "64", "--layers", "1-2"]
    arguments += ["--steps", "2", "--batch", "4", "--latent", "12"]
    result = runner.invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "my model" / "config.json").read_text())
    held_out = record["facts"]["held_out"]
    assert len(held_out) + record["facts"]["images"] == 8
    assert len(set(held_out)) == len(held_out)
    assert record["config"]["held_out"] == 0.4
    (line,) = (line for line in result.output.splitlines() if line.startswith("Next: "))
    program, *words = shlex.split(line.removeprefix("Next: "))
    assert [program, words[0]] == ["saae-export", "build"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--normal"] == folders
    assert words[-2:] == ["--checkpoint", str(tmp_path / "my model")]


def test_only_these_options_can_be_repeated() -> None:
    assert repeatable(app) == {
        "fetch": set(),
        "demo": set(),
        "check": {"--normal", "--abnormal", "--masks"},
        "fit": {"--normal", "--set"},
        "evaluate": set(),
        "selftest": {"--normal"},
        "tables": {"--set"},
        "fit-many": {"--set"},
    }
