"""`saae-train evaluate` on sets that lack something: right numbers or a clear word, never NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_detector
from tiny_sets import write_square_set
from typer.testing import CliRunner

from saae_train.cli.command import app
from saae_train.config import FitConfig
from saae_train.model.checkpoint import Checkpoint, save_checkpoint
from saae_train.record import FitRecord

NO_MASKS = "the defective images have no ground-truth masks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nothing was fitted to: its numbers are poor, and all there."""
    config = FitConfig(
        backbone="vit_tiny_patch16_224", layers=(0, 1, 2), input_size=(64, 64), score="l2", memory=None, held_out=0.15
    )
    fitted = Checkpoint(tiny_detector(), config, "part", FitRecord(fitted_on=()))
    return save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", fitted)


def evaluate(checkpoint: Path, data: Path) -> tuple[dict[str, Any], str]:
    """The JSON it wrote, and what it printed without line breaks."""
    words = ["evaluate", str(checkpoint), "--data", str(data), "--out", str(data / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    text = (data / "out" / "evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    printed = " ".join(done.output.split())
    assert " nan" not in printed.lower()
    found = json.loads(text)
    for subset in (found["overall"], *found["by_type"]):
        for name, metric in subset["metrics"].items():
            assert metric["value"] is not None or metric["reason"], name
            assert metric["value"] is not None or metric["reason"] in printed
    return found, printed


def values(subset: dict[str, Any]) -> dict[str, float | None]:
    return {name: metric["value"] for name, metric in subset["metrics"].items()}


def test_without_masks_the_image_metrics_remain(checkpoint: Path, tmp_path: Path) -> None:
    found, text = evaluate(checkpoint, write_square_set(tmp_path, masks=False))
    metrics = values(found["overall"])
    missing = {"pixel_roc_auc", "pro_auc", "pixel_average_precision", "pixel_best_f1", "pixel_tpr", "pixel_fpr_halo"}
    assert {name for name, value in metrics.items() if value is None} == missing
    assert NO_MASKS in text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "image-precision-recall.png",
        "image-roc.png",
        "sheet.png",
    ]


def test_one_type_without_masks_is_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    write_square_set(tmp_path)
    blind = tmp_path / "part/test/blind"
    blind.mkdir()
    for path in (tmp_path / "part/test/spot").iterdir():
        Image.open(path).rotate(180).save(blind / path.name)
    found, text = evaluate(checkpoint, tmp_path)
    blind_type, spot = found["by_type"]
    assert blind_type["metrics"]["pixel_roc_auc"]["reason"] == NO_MASKS
    assert blind_type["metrics"]["image_roc_auc"]["value"] is not None
    assert None not in values(spot).values()
    assert values(found["overall"])["pixel_roc_auc"] == values(spot)["pixel_roc_auc"]
    assert f"blind, pixel_roc_auc, pro_auc, pixel_average_precision, pixel_best_f1, pixel_tpr: {NO_MASKS}" in text


def test_an_all_normal_set_has_false_alarms_alone(checkpoint: Path, tmp_path: Path) -> None:
    found, text = evaluate(checkpoint, write_square_set(tmp_path, bad=0))
    metrics = values(found["overall"])
    assert {name for name, value in metrics.items() if value is not None} == {
        "pixel_fpr",
        "pixel_fpr_good",
        "image_fpr",
    }
    assert "no defective pixel in the test set" in text
    assert "no defective image in the test set" in text
    assert found["by_type"] == []
    assert (tmp_path / "out" / "sheet.png").exists()  # at the calibrated T


def test_no_good_test_image(checkpoint: Path, tmp_path: Path) -> None:
    found, text = evaluate(checkpoint, write_square_set(tmp_path, good=0))
    metrics = values(found["overall"])
    assert metrics["pixel_roc_auc"] is not None  # the squares' surroundings are defect-free
    assert metrics["image_roc_auc"] is None
    assert metrics["image_fpr"] is None
    assert "no defect-free image in the test set" in text


@pytest.mark.parametrize("good", [0, 2])
def test_masks_that_cover_everything(checkpoint: Path, tmp_path: Path, good: int) -> None:
    write_square_set(tmp_path, good=good)
    for path in (tmp_path / "part/ground_truth/spot").iterdir():
        Image.fromarray(np.full((70, 64), 255, np.uint8)).save(path)
    found, text = evaluate(checkpoint, tmp_path)
    metrics = values(found["overall"])
    if good:
        assert [name for name, value in metrics.items() if value is None] == ["pixel_fpr_halo"]  # no defect-free pixel
    else:
        assert metrics["pixel_roc_auc"] is None
        assert metrics["pro_auc"] is None
        assert metrics["pixel_fpr"] is None
        assert metrics["pixel_tpr"] is not None
        assert "no defect-free pixel in the test set" in text


def test_images_of_many_sizes_with_rates_and_intervals(checkpoint: Path, tmp_path: Path) -> None:
    write_square_set(tmp_path)
    for index, path in enumerate(sorted((tmp_path / "part").rglob("test/*/*.png"))):
        size = (50 + 9 * index, 90 - 7 * index)
        mask = tmp_path / "part/ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        for file in (path, mask):
            if file.exists():
                Image.open(file).resize(size, Image.Resampling.NEAREST).save(file)
    found, text = evaluate(checkpoint, tmp_path)
    assert None not in values(found["overall"]).values()
    assert len({tuple(image["size"]) for image in found["images"]}) == 6
    assert "calibrated on" in found["threshold_source"]
    assert "pixel FPR of 0.001" in text
    for metric in found["overall"]["metrics"].values():  # of three good and three bad images each has an interval
        if metric["value"] not in (0.0, 1.0):
            low, high = metric["interval"]
            assert 0 <= low <= high <= 1
