"""The served graph computes what the bundle's graph computes, bit for bit, and asks for no threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from needs import need
from tiny_bundle import make_tiny_bundle, tiny_graph

from saae_export.triton.graph import serving_graph
from saae_runtime.errors import ConfigError, DataError


def run(model: bytes, frames: np.ndarray) -> dict[str, np.ndarray]:
    ort = need("onnxruntime")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {"frame": frames}), strict=True))


def same_numbers(path: Path, size: tuple[int, int]) -> onnx.ModelProto:
    """Holds the served graph against the one that it is made from; returns it."""
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    served = serving_graph(path)
    found, expected = run(served, frames), run(path.read_bytes(), frames)
    assert set(found) == {"anomaly_map", "score"}
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name])
    assert found["score"].min() > 0
    return onnx.load_from_string(served)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tiny_graph(tmp_path: Path, precision: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_graph((16, 24), precision=precision))
    served = same_numbers(path, (16, 24))
    assert [item.name for item in served.graph.input] == ["frame"]
    assert "threshold" not in {item.name for item in served.graph.initializer}
    assert {item.key: item.value for item in served.metadata_props}["saae.precision"] == precision


@pytest.mark.needs("torch")
def test_fused_graph(tmp_path: Path) -> None:
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    detector = tiny_detector(components=48, smoothing=0.5, score="memory", memory=14)
    path = export_onnx(FusedGraph(detector, (80, 100)), tmp_path / "model.onnx", 0.5, {"saae.category": "x"})
    served = same_numbers(path, (80, 100))
    whole = onnx.load(path)
    kept = {node.name for node in served.graph.node}
    # The comparison with T and its two casts are what is left out.
    left_out = [node.op_type for node in whole.graph.node if node.name not in kept]
    assert sorted(left_out) == ["Cast", "Cast", "Greater"]
    assert served.metadata_props == whole.metadata_props


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    assert serving_graph(bundle / "model.onnx") == serving_graph(bundle / "model.onnx")


def test_what_is_no_graph_of_saae_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(DataError, match="cannot be read"):
        serving_graph(path)
    model = onnx.load_from_string(tiny_graph((16, 24)))
    del model.graph.output[0]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="not a graph of saae"):
        serving_graph(path)


def test_a_map_that_rests_on_the_threshold_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_graph((16, 24)))
    for node in model.graph.node:
        if node.output[0] == "centred":
            node.input[1] = "threshold"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="depends on the threshold"):
        serving_graph(path)
