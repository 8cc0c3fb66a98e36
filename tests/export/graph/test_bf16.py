"""The graph holds in bf16: residuals, not small differences of large sums, and a score that stays FP32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import need
from tiny_models import tiny_detector

from saae_export.graph.fused import FusedGraph
from saae_export.graph.onnx_file import export_onnx
from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.backends.openvino.precise import STANDARDISED, keep_precise, round_the_search
from saae_train.model.detector import FeatureSpace, anomaly_score

SIZE = (80, 100)


def _features(seed: int) -> tuple[torch.Tensor, FeatureSpace]:
    """Features that lie almost wholly inside 32 of 256 components, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(256, 32, generator=generator))
    inside = torch.randn(4, 50, 32, generator=generator) * 8
    outside = torch.randn(4, 50, 256, generator=generator) * 0.2
    return inside @ basis.T + outside, FeatureSpace(torch.zeros(256), torch.ones(256), basis)


@pytest.mark.parametrize("kind", ["cosine", "joint"])
def test_the_score_in_bf16_moves_by_little(kind: str) -> None:
    f, space = _features(0)
    projected = space(f)
    g_hat = projected.g + 1.5 * torch.randn(projected.g.shape, generator=torch.Generator().manual_seed(1))
    expected = anomaly_score(projected, g_hat, kind)
    # What a device does that computes in bf16: every tensor is rounded, sums included.
    half = torch.bfloat16
    standard = f.to(half)
    basis = space.basis.to(half)
    g = standard @ basis
    residual = standard - g @ basis.T
    residual_energy, energy = ((x * x).sum(dim=2) for x in (residual, standard))
    rounded = projected._replace(g=g.float(), residual_energy=residual_energy.float(), energy=energy.float())
    found = anomaly_score(rounded, g_hat.to(half), kind)
    assert float(((found - expected).abs() / expected.mean()).max()) < 0.03


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = tiny_detector(size=(160, 160), components=48, score="memory", memory=400, smoothing=0.5)
    target = tmp_path_factory.mktemp("bf16") / "model.onnx"
    return export_onnx(FusedGraph(detector, SIZE, "fp32"), target, 0.5, {"saae.category": "tiny"})


def read(file: Path) -> Any:
    model = need("openvino").Core().read_model(str(file))
    model.reshape({"frame": [1, *SIZE, 3]})
    return model


def test_features_and_patch_scores_are_found(file: Path) -> None:
    model = read(file)
    features, scores = keep_precise(model)
    assert features == STANDARDISED
    assert scores.startswith("anomaly_map/")
    shapes = [tuple(output.shape) for output in model.outputs[3:]]
    assert shapes == [(1, 101, 3 * 192), (1, 10, 10)]  # 100 patches and the class token, three layers
    assert [min(output.names) for output in model.outputs[:3]] == ["anomaly_map", "score", "mask"]


def test_a_graph_of_an_earlier_release_stays_as_it_is() -> None:
    """Its upsample had a constant on the right; its thresholds hold for what it computed."""
    ov = need("openvino")
    ops = need("openvino.opset13")
    scores = ops.parameter([1, 4, 5], ov.Type.f32)
    half = ops.matmul(np.ones((8, 4), np.float32), ops.multiply(scores, np.float32(2)), False, False)
    for constant_last in (True, False):
        if constant_last:
            full = ops.matmul(half, np.ones((5, 9), np.float32), False, False)
        else:
            full = ops.matmul(np.ones((9, 8), np.float32), half, False, False)
        full.output(0).get_tensor().set_names({"anomaly_map"})
        model = ov.Model([ops.result(full)], [scores])
        assert len(keep_precise(model)) == (0 if constant_last else 1)
        assert len(model.outputs) == (1 if constant_last else 2)


def executed(model: Any) -> Iterator[tuple[str, str]]:
    """(name, precision) of what OpenVINO makes of a model in bf16."""
    compiled = need("openvino").Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) not in ("Const", "Output"):
            yield node.get_friendly_name(), facts["runtimePrecision"].astype(str)


def test_the_score_is_computed_in_fp32_and_the_backbone_in_bf16(file: Path) -> None:
    if reason := bf16_missing():
        pytest.skip(reason)
    model = read(file)
    before = {name: kind for name, kind in executed(read(file)) if name in ("anomaly_map", "residual/ReduceMean")}
    assert before == {"anomaly_map": "f32", "residual/ReduceMean": "bf16"}
    keep_precise(model)
    round_the_search(model)
    found = dict(executed(model))
    of_the_map = {kind for name, kind in found.items() if name.startswith(("anomaly_map", "score"))}
    assert of_the_map == {"f32"}, "a tensor between the patch scores and the map is rounded"
    of_the_score = [kind for name, kind in found.items() if "/ReduceSum" in name or name == "residual/ReduceMean"]
    assert len(of_the_score) > 5
    assert "bf16" not in of_the_score
    of_the_search = {found[f"residual/memory/{name}"] for name in ("ReduceMax", "TopK", "GatherElements", "TopK_1")}
    assert of_the_search == {"bf16"}, "FP32 would find the same entries, later"
    assert found[STANDARDISED] == "f32"
    assert "bf16" in {kind for name, kind in found.items() if name.startswith("block_")}


def test_the_marks_of_the_search_come_off_again(file: Path) -> None:
    model = read(file)

    def marked() -> int:
        return sum("enforceBF16evenForGraphTail" in operation.get_rt_info() for operation in model.get_ops())

    assert marked() == 0
    round_the_search(model)
    assert 8 <= marked() <= 16
    round_the_search(model, False)
    assert marked() == 0
