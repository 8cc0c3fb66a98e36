"""`saae-train fit` and `saae-export build` side by side: neither removes what the other made; one feeds the other."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from folders import leftovers
from tiny_builds import draw
from tiny_models import TINY
from typer.testing import CliRunner

from saae_export.cli.command import app as export_app
from saae_runtime.bundle import open_bundle
from saae_train.calibrate import OBJECT_FPR
from saae_train.cli.command import app as train_app
from saae_train.data.category import find_category
from saae_train.data.split import content_digest, content_hashes, split_held_out
from saae_train.model.checkpoint import load_checkpoint

APPS = {"saae-train": train_app, "saae-export": export_app}

MODEL = (
    "--backbone", TINY, "--weights", "random", "--layers", "1-2", "--input-size", "64", "--components", "32",
    "--latent", "12", "--epochs", "1", "--batch", "4", "--loss", "l2", "--score", "joint", "--smoothing", "0.5",
    "--fit-precision", "fp32", "--object", "--cache", "cache",
)  # fmt: skip
"""Every option of fitting, in the one grammar that both commands take."""

QUICK = (
    "--no-selftest",
    "--no-latency",
    "--engine",
    "none",
    "--parity-images",
    "2",
    "--precision",
    "fp32",
    "--frame-size",
    "model",
)


def _run(folder: Path, program: str, *arguments: str) -> str:
    """What a command says that is typed in a folder; in this process, which has its libraries already."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(APPS[program], arguments, env={"COLUMNS": "200", "SAAE_DATA": None})
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_fit_and_build_live_beside_each_other(tmp_path: Path) -> None:
    """Build, fit, build, fit with the default folders; then the line that `fit` says to type next, as it stands."""
    draw(tmp_path / "my data")
    _run(tmp_path, "saae-export", "build", "--category", "weave", "--data", "my data", *MODEL, *QUICK)
    said = _run(tmp_path, "saae-train", "fit", "--category", "weave", "--data", "my data", *MODEL, "--seed", "3")
    work = tmp_path / "runs" / "weave"
    fitted = load_checkpoint(work / "checkpoint")
    (built,) = (work / "models").iterdir()
    before = load_checkpoint(built)
    assert before.config.replace(seed=3) == fitted.config, "one set of options, two models"
    assert before.record.texture is fitted.record.texture is False

    again = _run(tmp_path, "saae-export", "build", "--category", "weave", "--data", "my data", *MODEL, *QUICK)
    assert "reused" in again
    _run(tmp_path, "saae-train", "fit", "--category", "weave", "--data", "my data", *MODEL, "--seed", "3")
    load_checkpoint(built)
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint", "models"]
    assert list((tmp_path / "cache" / "states").iterdir()) == []
    assert leftovers(tmp_path) == []

    (line,) = (line for line in said.splitlines() if line.startswith("Next: "))
    program, *arguments = shlex.split(line.removeprefix("Next: "))
    said = _run(tmp_path, program, *arguments, *QUICK)
    assert "FITTED ON" not in said
    manifest = open_bundle(tmp_path / "bundles" / "weave").manifest
    fitting, held_out = split_held_out(find_category(tmp_path / "my data", "weave").train, seed=3)
    assert fitted.record.fitted_on == tuple(sorted(content_hashes(fitting)))
    assert manifest.calibration.held_out is True
    assert manifest.calibration.digest == content_digest(held_out)
    assert manifest.model.config["seed"] == 3
    # `weave` is a texture by its name, but this model was fitted as an object.
    assert manifest.thresholds["fp32"].pixel.default_fpr == OBJECT_FPR


def test_a_fit_that_has_no_place_to_go_is_refused_before_it(tmp_path: Path) -> None:
    draw(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.txt").write_text("mine")
    cache = tmp_path / "cache"
    arguments = ["fit", "--category", "weave", "--data", str(tmp_path / "data"), *MODEL[:-1], str(cache)]
    done = CliRunner().invoke(train_app, [*arguments, "--out", str(tmp_path / "mine")])
    assert done.exit_code == 2
    assert "not a checkpoint" in done.output
    assert not cache.exists(), "features were computed first"
    assert (tmp_path / "mine" / "holiday.txt").read_text() == "mine"
