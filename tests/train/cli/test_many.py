"""`saae-train fit-many` as a person types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from here_workers import Here
from tiny_sets import TINY_CHANGES, write_square_set
from typer.testing import CliRunner

from saae_train.cli.command import app
from saae_train.model.checkpoint import load_checkpoint

pytestmark = pytest.mark.needs("timm")

SET = [
    word
    for key, value in TINY_CHANGES.items()
    for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
]


def typed(*words: object) -> tuple[int, str]:
    options = [*SET, "--weights", "random", "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, *options)], env={"COLUMNS": "200"})
    return done.exit_code, " ".join(done.output.split())


def test_it_makes_what_fit_makes_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saae_train.cli.workers.Processes", Here)
    for name in ("bottle", "tile"):
        write_square_set(tmp_path / "data", name, train=6, good=1, bad=1)
    many = ("fit-many", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--cache", tmp_path / "cache")
    code, text = typed(*many)
    assert code == 0, text
    assert str(tmp_path / "runs/tile/checkpoint") in text
    alone = ("--data", tmp_path / "data", "--out", tmp_path / "alone", "--cache", tmp_path / "other")
    code, text = typed("fit", "--category", "tile", *alone)
    assert code == 0, text
    ours, theirs = (load_checkpoint(path) for path in (tmp_path / "runs/tile/checkpoint", tmp_path / "alone"))
    assert ours.config == theirs.config
    for name in ("fitted_on", "held_out", "digest", "texture", "synthetic", "images", "precision"):
        assert getattr(ours.record, name) == getattr(theirs.record, name)
    assert np.allclose(np.array(ours.record.loss), np.array(theirs.record.loss), rtol=1e-3)
    code, text = typed(*many)
    assert code == 0
    assert "2 of 2 checkpoints were there already" in text
    (tmp_path / "data/bottle/train/good/0.png").write_bytes(b"no image")
    code, text = typed(*many)
    assert code == 1
    assert "bottle: " in text
    assert "0.png" in text
    assert "1 of 2 checkpoints were there already" in text


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write_square_set(tmp_path / "data", "bottle")
    (tmp_path / "empty").mkdir()
    for words, told in (
        (("--data", tmp_path / "data", "--categories", "nothere"), "nothere"),
        (("--data", tmp_path / "empty"), "holds no category"),
    ):
        code, text = typed("fit-many", *words)
        assert code == 2
        assert told in text


@pytest.mark.parametrize("asked", [("--ray",), ("--ray-address", "local")], ids=" ".join)
@pytest.mark.parametrize("command", ["fit-many", "tables"])
def test_without_a_cluster_nothing_is_begun_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, asked: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    write_square_set(tmp_path / "data", "bottle")
    code, text = typed(command, "--data", tmp_path / "data", "--out", tmp_path / "out", "--preset", "fast", *asked)
    assert code == 2
    assert "pip install 'saae[ray]'" in text
    assert not (tmp_path / "out").exists()
