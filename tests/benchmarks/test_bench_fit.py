"""The loops that benchmarks/fit.py compares compute the same fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `train`")

from typer import Typer
from typer.testing import CliRunner

from benchmarks import fit as bench
from saae_train import presets


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = presets.FitConfig(
        preset="tiny",
        backbone="test_vit2",
        layers=(1, 2),
        input_size=(48, 48),
        components=24,
        latent=6,
        batch=3,
        steps=9,
        warmup=2,
        precision="fp32",
    )
    monkeypatch.setattr(presets, "PRESETS", {"tiny": config})


def test_all_ways_come_to_the_same_loss(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    out = tmp_path / "fit.json"
    words = ["--preset", "tiny", "--images", "5", "--steps", "7", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    rows = {row["way"]: row for row in data["rows"]}
    assert list(rows) == list(bench.WAYS)
    assert all(row["timing"]["runs"] == 4 for row in rows.values())
    # Features are kept as float16 and the backbone's are not, so the losses are near, not equal.
    assert rows["plain"]["loss"] == pytest.approx(rows["saae"]["loss"], rel=1e-3)
    assert rows["plain, backbone"]["loss"] == pytest.approx(rows["saae"]["loss"], rel=1e-3)
    assert data["model"]["whole_fit_steps"] == 9
    assert rows["plain"]["ratio"] == 1.0


def test_too_few_images(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    done = CliRunner().invoke(app, ["--preset", "tiny", "--images", "2", "--normal", str(tmp_path)])
    assert done.exit_code != 0
    assert "holds 0 images" in done.output + str(done.stderr)
