"""Builds on real photographs, and with real weights: the sizes and files that drawn images of 96 pixels have not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_builds import options, quiet_build
from typer import Typer
from typer.testing import CliRunner, Result

from saae_export.cli.command import app as export_app
from saae_export.pipeline.build import BuildResult
from saae_export.pipeline.images import Request
from saae_runtime import Engine, open_bundle
from saae_runtime.cli.command import app as run_app
from saae_runtime.images import read_image
from saae_train.data.category import find_category
from saae_train.data.demo import write_demo


@pytest.fixture(scope="module")
def bottles(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good bottles and one of each kind of test image, in the tree's own layout."""
    root = tmp_path_factory.mktemp("photographs")
    category = find_category(shared_data, "bottle")
    chosen = list(category.train[:8])
    for label in ("good", *category.defect_types):
        chosen.append(next(sample for sample in category.test if sample.label == label))
    for sample in chosen:
        for file in filter(None, (sample.path, sample.mask)):
            target = root / "bottle" / file.relative_to(category.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return root


@pytest.fixture(scope="module")
def built(bottles: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("bottle")
    request = Request("bottle", bottles)
    return quiet_build(options(bottles, folder, request=request, precisions=("fp32",), parity_images=2))[0]


def test_photographs_become_a_bundle_at_their_own_size(built: BuildResult, bottles: Path) -> None:
    category = find_category(bottles, "bottle")
    frame = read_image(category.train[0].path)
    manifest = open_bundle(built.where, verify=True).manifest
    assert (manifest.frame.height, manifest.frame.width) == frame.shape[:2]
    assert manifest.synthetic is False
    assert manifest.calibration.left_out
    assert manifest.calibration.images == len(category.train)
    found = {item.precision: item.parity.passed for item in manifest.artefacts if item.parity}
    found.pop("bf16", None)  # where the processor has it
    assert found == {"fp32": True}
    assert built.evaluation is not None
    assert built.evaluation.overall.images == len(category.test) == 1 + len(category.defect_types)
    assert 0 <= manifest.metrics["pixel_roc_auc"] <= 1


def test_the_engine_scores_photographs(built: BuildResult, bottles: Path) -> None:
    category = find_category(bottles, "bottle")
    frames = [read_image(sample.path) for sample in (*category.train, *category.test)]
    with Engine(built.where, backend="onnxruntime:cpu") as engine:
        together = engine(frames)
        for frame, found in zip(frames, together, strict=True):
            alone = engine(frame)
            assert alone.score == pytest.approx(found.score, rel=1e-4)
            assert alone.anomaly_map.shape == frame.shape[:2]
            assert alone.is_anomalous == (alone.score > engine.image_threshold)
            assert (alone.mask == (alone.anomaly_map > engine.threshold)).all()
        assert len({round(found.score, 6) for found in together}) > len(frames) // 2


@pytest.mark.slow
def test_the_demos_road_with_real_weights(
    packaged_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make demo` types, on a few small drawn zippers: build, then heatmaps of the files that a pattern names."""
    write_demo(tmp_path / "data", "zipper", size=(112, 112), train=10, test_good=1, per_defect=1)
    monkeypatch.chdir(tmp_path)

    def run(app: Typer, *arguments: str) -> Result:
        kept = {"SAAE_DATA": None, "SAAE_DEBUG": None, "SAAE_CACHE": "cache", "COLUMNS": "200"}
        return CliRunner().invoke(app, arguments, env=kept)

    done = run(
        export_app, "build", "--category", "zipper", "--data", "data", "--out", "demo-out/zipper",
        "--work", "demo-out/work", "--input-size", "112", "--steps", "5", "--engine", "none", "--no-latency",
        "--precision", "fp32", "--parity-images", "2", "--no-selftest",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    manifest = open_bundle(tmp_path / "demo-out" / "zipper", verify=True).manifest
    assert manifest.backbone.name == "vit_small_patch14_dinov2"
    assert manifest.synthetic is True
    assert (manifest.model.height, manifest.model.grid) == (112, (8, 8))
    found = {item.precision: item.parity.passed for item in manifest.artefacts if item.parity}
    found.pop("bf16", None)  # where the processor has it
    assert found == {"fp32": True}

    shown = run(
        run_app, "demo-out/zipper", "data/zipper/test/*/000.png", "--out", "demo-out/heatmaps",
        "--sheets", "--heatmaps",
    )  # fmt: skip
    assert shown.exit_code in (0, 1), shown.stderr  # 1: a defect was found
    files = sorted((tmp_path / "data" / "zipper" / "test").glob("*/000.png"))
    assert len(files) >= 2
    written = list((tmp_path / "demo-out" / "heatmaps").rglob("*.png"))
    assert len(written) >= 2 * len(files), [str(path) for path in written]
    lines = [line for line in shown.stdout.splitlines() if "000.png" in line]
    assert len(lines) == len(files), shown.stdout
