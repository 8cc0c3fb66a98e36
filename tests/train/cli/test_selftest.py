"""`saae-train selftest` as a person types it, on a bundle and on a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import make_tiny_bundle
from typer.testing import CliRunner

from saae_runtime.errors import ConfigError, DataError
from saae_train.cli.command import app
from saae_train.data.demo import write_demo

pytestmark = pytest.mark.needs("torch", "onnxruntime")

runner = CliRunner()


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight gray parts with structure of at most 25 levels, which the tiny bundle (T = 40 from mid-gray) accepts."""
    folder = tmp_path_factory.mktemp("normal")
    y, x = np.mgrid[:64, :96]
    for index in range(8):
        noise = np.random.default_rng(index).normal(0, 2, (64, 96))
        field = 128 + 18 * np.sin(x / 5) * np.cos(y / 7) + noise
        Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def test_a_bundle(normal: Path, tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    bundle.rename(tmp_path / ".bundle.0123abcd.old")  # its replacement was killed
    arguments = ["selftest", str(bundle), "--normal", str(normal), "--frames", "24", "--backend", "onnxruntime:cpu"]
    done = runner.invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "SIMULATED" in done.output
    assert "not the images that the bundle was built from" in " ".join(done.output.split())
    record = json.loads((tmp_path / "out" / "selftest.json").read_text())
    assert record["simulated"] is True
    assert record["image_threshold"] == 40.0
    assert record["false_alarms"] == {**record["false_alarms"], "found": 0, "count": 8}
    assert record["large_strong"]["found"] >= 4
    assert len(record["defects"]) + sum(record["not_drawn"].values()) == 24
    for name in ("chart.png", "sheet.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 200

    looser = runner.invoke(app, [*arguments, "--image-fpr", "0.01", "--fpr", "0", "--out", str(tmp_path / "looser")])
    assert looser.exit_code == 0, looser.output
    other = json.loads((tmp_path / "looser" / "selftest.json").read_text())
    assert (other["threshold"], other["image_threshold"]) == (60.0, 20.0)
    assert other["found"]["found"] > record["found"]["found"]
    assert other["marked"]["found"] <= record["marked"]["found"]


@pytest.mark.parametrize(
    ("more", "held", "source"),
    [(["--score", "cosine"], 4, "calibrated on 4 normal images"), ([], 0, "from 9 normal images, each left out")],
    ids=["held-out", "memory"],
)
def test_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], held: int, source: str) -> None:
    """It has no thresholds: they come from images that it was not fitted on, or from each left out of the memory."""
    monkeypatch.setenv("SAAE_CACHE", str(tmp_path / "cache"))
    write_demo(tmp_path, "weave", size=(64, 64), train=9, test_good=1, per_defect=1)
    fit = ["fit", "--category", "weave", "--data", str(tmp_path), "--out", str(tmp_path / "model"), "--steps", "2"]
    fit += ["--backbone", "vit_tiny_patch16_224", "--weights", "random", "--input-size", "64", "--layers", "1-2"]
    fitted = runner.invoke(app, [*fit, "--batch", "4", "--latent", "12", "--components", "16", *more])
    assert fitted.exit_code == 0, fitted.output
    arguments = [
        "selftest",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path),
        "--frames",
        "8",
        "--kinds",
        "spot,scratch",
    ]
    done = runner.invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert source in " ".join(done.output.split())
    record = json.loads((tmp_path / "out" / "selftest.json").read_text())
    assert record["synthetic"] is True
    assert record["false_alarms"]["count"] == 4
    assert record["false_alarms"]["found"] == 0
    held_out = set(json.loads((tmp_path / "model" / "config.json").read_text())["facts"]["held_out"])
    assert len(held_out) == held
    good = {path.name for path in (tmp_path / "weave" / "train" / "good").iterdir()}
    assert {Path(defect["file"]).name for defect in record["defects"]} <= (held_out or good)
    assert {defect["kind"] for defect in record["defects"]} <= {"spot", "scratch"}


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (["--kinds", "dent"], ConfigError, "dent"),
        ([], ConfigError, "Which images"),
        (["--normal", "nowhere"], DataError, "nowhere"),
    ],
)
def test_what_cannot_work(normal: Path, tmp_path: Path, extra: list[str], error: type[Exception], message: str) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    place = ["--normal", str(normal)] if "--kinds" in extra else []
    done = runner.invoke(app, ["selftest", str(bundle), *place, *extra, "--backend", "onnxruntime:cpu"])
    assert done.exit_code != 0
    assert isinstance(done.exception, error) or message in done.output
    assert message in f"{done.output}{done.exception}"
    assert not (tmp_path / "out").exists()
