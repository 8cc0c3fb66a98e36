"""`saae-train tables` as a person types it, on small drawn-free sets and random weights, each experiment really run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from here_workers import Here
from tiny_sets import TINY_CHANGES, write_square_set
from typer.testing import CliRunner

from saae_train.cli.command import app
from saae_train.data.category import SYNTHETIC_STAMP
from saae_train.experiments.experiment import run_experiment

pytestmark = pytest.mark.needs("timm")

SET = [
    word
    for key, value in TINY_CHANGES.items()
    for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the paper's classes (one a texture), one without masks, one without any defect."""
    root = tmp_path_factory.mktemp("data")
    write_square_set(root, "bottle")
    write_square_set(root, "tile")
    write_square_set(root, "blind", masks=False)
    write_square_set(root, "clean", bad=0)
    return root


def tables(data: Path, out: Path, *more: str) -> tuple[int, str]:
    """Runs the command; what it printed, without line breaks."""
    words = ["tables", "--data", str(data), "--out", str(out), "--preset", "fast"]
    for option, value in zip(SET[::2], SET[1::2], strict=True):
        if not any(word.startswith(value.partition("=")[0] + "=") for word in more):
            words += [option, value]
    words += [*([] if "--weights" in more else ["--weights", "random"]), *more]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs experiments in this process (test_experiment.py covers processes of their own); gives what ran."""
    ran: list[str] = []

    def run(experiment, report):  # type: ignore[no-untyped-def]
        ran.append(experiment.category)
        return run_experiment(experiment, report=report)

    monkeypatch.setattr("saae_train.experiments.plan.run_experiment", run)
    monkeypatch.setattr("saae_train.cli.workers.Processes", Here)
    return ran


def test_ours_stand_beside_the_papers_and_nothing_is_run_twice(
    data: Path, tmp_path: Path, in_this_process: list[str]
) -> None:
    code, text = tables(data, tmp_path, "--table", "2,3", "--categories", "bottle,tile")
    assert code == 0, text
    assert in_this_process == ["tile", "bottle"]
    for words in ("Table 2.", "Table 3.", "mean of objects", "97.9", "94.3", "over 1 of 10 classes", "random weights"):
        assert words in text
    lines = {
        (r["table"], r["row"]): r for r in csv.DictReader((tmp_path / "tables.csv").open()) if r["column"] == "Ours"
    }
    bottle, mean = lines["2", "bottle"], lines["2", "mean"]
    assert 0 <= float(bottle["ours"]) <= 100
    assert float(bottle["paper"]) == 97.9
    assert float(mean["paper"]) == pytest.approx((97.9 + 97.3) / 2)
    assert float(mean["ours"]) == pytest.approx((float(bottle["ours"]) + float(lines["2", "tile"]["ours"])) / 2)
    experiments = {
        json.loads(p.read_text())["row"]["category"]: json.loads(p.read_text())["row"]
        for p in (tmp_path / "experiments").iterdir()
    }
    assert (experiments["tile"]["fitted_config"]["mlp_ratio"], experiments["bottle"]["fitted_config"]["mlp_ratio"]) == (
        1,
        2,
    )
    assert {row["pixel_fpr"] for row in experiments.values()} == {0.001}
    assert experiments["bottle"]["overall"]["metrics"]["pixel_roc_auc"]["value"] * 100 == float(bottle["ours"])
    assert "| bottle |" in (tmp_path / "tables.md").read_text()
    code, text = tables(data, tmp_path, "--table", "2,3", "--categories", "bottle,tile")
    assert (code, len(in_this_process)) == (0, 2)
    assert "2 of 2 experiments were there already" in text


def test_what_cannot_be_measured_says_why(data: Path, tmp_path: Path, in_this_process: list[str]) -> None:
    code, text = tables(data, tmp_path, "--table", "2,3", "--categories", "blind,clean,bottle")
    assert code == 1  # numbers are missing
    assert "no value: the defective images have no ground-truth masks" in text
    assert "no value: no defective pixel in the test set" in text
    data_json = json.loads((tmp_path / "tables.json").read_text())
    figures = {(e["row"], t["table"]): e for t in data_json["tables"] for e in t["entries"]}
    assert figures["blind", "2"]["ours"] is None
    assert figures["blind", "2"]["reason"]
    assert figures["bottle", "2"]["ours"] is not None
    for name in ("tables.md", "tables.csv", "tables.json"):
        assert "nan" not in (tmp_path / name).read_text().lower().replace("mean", "")


def test_an_experiment_that_fails_is_told_and_the_others_go_on(
    data: Path, tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data / "bottle", broken / "bottle")
    shutil.copytree(data / "tile", broken / "tile")
    (broken / "tile/test/spot/0.png").write_bytes(b"no image")
    code, text = tables(broken, tmp_path / "out", "--table", "2")
    assert code == 1
    assert "failed: " in text
    assert "spot/0.png: cannot be read as an image" in text
    assert in_this_process == ["tile", "bottle"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, text = tables(broken, tmp_path / "out", "--table", "2", "--weights", str(tmp_path / "none.pth"))
    assert "not run: no weights: No weights file" in text
    assert in_this_process == ["tile", "bottle", "tile"]  # the missing file was asked for once


def test_drawn_sets_have_nothing_published_beside_them(data: Path, tmp_path: Path, in_this_process: list[str]) -> None:
    shutil.copytree(data / "bottle", tmp_path / "data/bottle")
    (tmp_path / "data/bottle" / SYNTHETIC_STAMP).write_text("{}")
    code, text = tables(tmp_path / "data", tmp_path / "out", "--table", "2")
    assert code == 0
    assert "drawn images" in text
    assert "97.9" not in text


def test_stopping_keeps_what_is_finished(
    data: Path, tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(experiment, report):  # type: ignore[no-untyped-def]
        if experiment.category == "bottle":
            raise KeyboardInterrupt
        return run_experiment(experiment, report=report)

    monkeypatch.setattr("saae_train.experiments.plan.run_experiment", stop)
    code, text = tables(data, tmp_path, "--table", "2", "--categories", "tile,bottle")
    assert code == 130
    assert "not run: stopped before it" in text
    assert [path.name.partition("-")[0] for path in (tmp_path / "experiments").iterdir()] == ["tile"]
    assert json.loads((tmp_path / "tables.json").read_text())["tables"]


def test_a_dry_run_lists_and_runs_nothing(data: Path, tmp_path: Path, in_this_process: list[str]) -> None:
    code, text = tables(data, tmp_path, "--table", "4,5", "--categories", "bottle", "--dry-run")
    assert (code, in_this_process) == (0, [])
    assert "16 of 16 experiments to run" in text
    assert "vgg19" in text
    assert "V of f4" not in text  # V is set by hand here
    assert list(tmp_path.iterdir()) == []
    code, text = tables(
        data, tmp_path, "--table", "2,5", "--columns", "Ours,f1:4", "--set", "layers=[0,1,2,3,4]", "--dry-run"
    )
    assert "4 of 4 experiments to run" in text  # the two columns are the same experiment, in four categories


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--table", "7"], "no Table 7"),
        (["--categories", "botle"], "bottle"),
        (["--set", "nonsense=1"], "--set nonsense=1 is not possible"),
        (["--seeds", "a"], "not a list of seeds"),
        (["--table", "2", "--columns", "f4"], "has no column f4"),
    ],
)
def test_errors_say_what_to_type(data: Path, tmp_path: Path, more: list[str], words: str) -> None:
    code, text = tables(data, tmp_path, *more)
    assert code == 2
    assert words in text.replace("│ ", "")


def test_frames_a_second_are_measured_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saae_train.experiments import speed

    monkeypatch.setattr("saae_train.cli.tables.COLUMNS", {"DFR": {**TINY_CHANGES, "transformer": False}})
    timed: list[object] = []
    interleaved = speed.interleaved

    def short(turns, seconds):  # type: ignore[no-untyped-def]
        timed.append(turns)
        return interleaved(turns, 0.1)

    monkeypatch.setattr(speed, "interleaved", short)
    code, text = tables(data, tmp_path, "--table", "fps", "--categories", "bottle", "--device", "cpu")
    assert code == 0, text
    found = json.loads((tmp_path / "tables.json").read_text())["tables"][0]
    figures = {figure["row"]: figure for figure in found["entries"]}
    assert figures["SAAE"]["ours"] > 0
    assert figures["SAAE"]["paper"] == 86
    assert figures["SAAE over DFR"]["ours"] == pytest.approx(figures["SAAE"]["ours"] / figures["DFR"]["ours"])
    assert "random weights" in text
    tables(data, tmp_path, "--table", "fps", "--categories", "bottle", "--device", "cpu")
    assert len(timed) == 1
