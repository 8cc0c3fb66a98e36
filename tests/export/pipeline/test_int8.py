"""INT8 in a build: shipped where it passes its gate, said and left out where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_builds import options, quiet_build

from saae_export.pipeline import quality as gate
from saae_export.pipeline.quality import Quality, Verdict, compare_quality
from saae_runtime import Engine
from saae_runtime.errors import CalibrationError
from saae_train.data.demo import write_demo


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_demo(root, "weave", size=(96, 80), train=28, test_good=3, per_defect=1)
    return root


def test_what_passes_is_shipped_with_thresholds_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_FALL", 1.0)
    monkeypatch.setattr(gate, "MOST_FLIPS", 1.0)
    result, said = quiet_build(options(data, tmp_path, int8=True, precisions=("fp32",)))
    manifest = result.bundle.manifest
    (artefact,) = result.bundle.artefacts(kind="onnx", precision="int8")
    assert artefact.file == "model.int8.onnx"
    assert artefact.parity is not None
    assert artefact.options["products"] > 5
    assert set(artefact.options["gate"]) == {"on", "pixel_roc_auc_fall", "pro_auc_fall", "flips", "images"}
    assert "test images" in said
    assert manifest.thresholds["int8"].pixel.at() != manifest.thresholds["fp32"].pixel.at()
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    assert sizes["model.int8.onnx"] < 0.6 * sizes["model.onnx"]
    frame = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    with (
        Engine(result.where, backend="onnxruntime:cpu", precision="int8") as small,
        Engine(result.where, backend="onnxruntime:cpu", precision="fp32") as whole,
    ):
        assert small.threshold == manifest.thresholds["int8"].pixel.at()
        a, b = small(frame).anomaly_map, whole(frame).anomaly_map
        assert 0 < np.abs(a - b).max() < 0.2 * b.max()
    with Engine(result.where, backend="onnxruntime:cpu") as engine:
        assert engine.backend.precision == "int8"


def test_what_fails_is_not_shipped_and_the_build_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_FALL", -1.0)
    result, said = quiet_build(options(data, tmp_path, int8=True, precisions=("fp32",)))
    assert "int8" not in result.bundle.manifest.thresholds
    assert "model.int8.onnx" not in result.bundle.manifest.files
    assert "refused" in said
    assert "No INT8 graph is shipped" in said


def test_too_few_images_are_found_before_the_fit(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_demo(root, "weave", size=(96, 80), train=12, test_good=1, per_defect=1)
    with pytest.raises(CalibrationError, match="INT8 needs 16"):
        quiet_build(options(root, tmp_path, int8=True))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("pixel", "pro", "flips", "passed"),
    [
        (0.99, 0.95, 0, True),
        (0.9875, 0.9475, 1, True),
        (0.9865, 0.95, 0, False),
        (0.99, 0.9465, 0, False),
        (0.99, 0.95, 2, False),
        (float("nan"), 0.95, 0, False),
        (1.0, 1.0, 0, True),
    ],
)
def test_the_gate(pixel: float, pro: float, flips: int, passed: bool) -> None:
    decided = tuple(index % 3 == 0 for index in range(100))
    changed = tuple(value ^ (index < flips) for index, value in enumerate(decided))
    verdict = compare_quality(Quality("x", 0.99, 0.95, decided), Quality("x", pixel, pro, changed))
    assert verdict.flips == flips
    assert verdict.passed is passed


def test_a_verdict_in_words() -> None:
    text = str(Verdict("60 simulated defects", 0.002, -0.001, 1, 90))
    assert text == ("pixel ROC-AUC -0.20, PRO-AUC +0.10 points on 60 simulated defects, 1 of 90 decisions differ")
