"""The loops that benchmarks/fit.py compares compute the same fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import fit as bench
from saae_train import config as presets


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
    words = ["--preset", "tiny", "--images", "5", "--steps", "8", "--device", "cpu", "--out", str(out)]
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
    assert {row["precision"] for row in rows.values()} == {"fp32"}
    assert (data["benchmark"], data["model"]["device"], data["model"]["captured"]) == ("fit-cpu", "cpu", False)
    assert {row["peak_device_gib"] for row in rows.values()} == {None}
    assert rows["plain, backbone"]["once_s"] is None


def test_the_precision_of_a_row_is_what_was_computed_in(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    out = tmp_path / "fit.json"
    words = ["--preset", "tiny", "--images", "3", "--steps", "2", "--device", "cpu", "--out", str(out)]
    for asked, saae in (("tf32", "fp32"), ("bf16", "bf16")):
        assert CliRunner().invoke(app, [*words, "--precision", asked]).exit_code == 0
        rows = {row["way"]: row["precision"] for row in json.loads(out.read_text())["rows"]}
        assert rows == {"saae": saae, "plain": "fp32", "plain, backbone": "fp32"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    out = tmp_path / "fit.json"
    words = ["--preset", "tiny", "--images", "5", "--steps", "12", "--device", "cuda", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    rows = {row["way"]: row for row in data["rows"]}
    assert data["model"]["captured"] is True
    assert data["benchmark"] == "fit"
    assert rows["plain"]["loss"] == pytest.approx(rows["saae"]["loss"], rel=1e-2)
    assert 0 < rows["saae"]["peak_device_gib"] <= data["model"]["peak_device_gib"]
    assert rows["saae"]["precision"] == rows["plain"]["precision"] == "fp32"


def test_too_few_images(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    done = CliRunner().invoke(app, ["--preset", "tiny", "--images", "2", "--normal", str(tmp_path)])
    assert done.exit_code != 0
    assert "holds 0 images" in done.output + str(done.stderr)
