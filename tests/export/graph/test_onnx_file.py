"""The exported files: checked, run by ONNX Runtime, equal to PyTorch, the same bytes twice, readable by TensorRT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import noise_frames, tiny_detector

from saae_export.artefacts import set_threshold
from saae_export.graph.fused import FusedGraph
from saae_export.graph.onnx_file import OPSET, check_onnx, export_onnx, run_onnx, session
from saae_export.parity.nodes import compare_nodes
from saae_export.parity.pytorch import TorchReference
from saae_runtime.errors import ConfigError, DataError, StorageError

SIZE = (80, 100)
BOUNDS = {"fp32": 1e-5, "fp16": 3e-3}
KEYWORDS = {"components": 48, "score": "cosine", "smoothing": 0.5}


@pytest.fixture(scope="module")
def detector():
    return tiny_detector(**KEYWORDS)


@pytest.fixture(scope="module")
def files(detector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return {
        precision: export_onnx(
            FusedGraph(detector, SIZE, precision), folder / f"{precision}.onnx", 0.5, {"saae.category": "tiny"}
        )
        for precision in BOUNDS
    }


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_equal_to_pytorch_at_any_batch(detector, files: dict[str, Path], precision: str, batch: int) -> None:
    frames = noise_frames(batch, SIZE, seed=batch)
    outputs = run_onnx(session(files[precision]), frames)
    reference = TorchReference(detector, SIZE)
    for index, frame in enumerate(frames):
        right = reference(frame)
        expected, score = right.anomaly_map, right.score
        bound = BOUNDS[precision] * float(np.abs(expected).max())
        assert np.abs(outputs["anomaly_map"][index] - expected).max() <= bound
        assert abs(outputs["score"][index] - score) <= bound


def test_tiles_are_inside_the_graph_at_any_batch(tmp_path: Path) -> None:
    detector = tiny_detector(size=(96, 80), layers=(0, 1), tiles=(2, 2), components=24, score="cosine")
    assert len(detector.backbone.tiles) == 4
    file = export_onnx(FusedGraph(detector, SIZE, "fp32"), tmp_path / "tiles.onnx", 0.5, {"saae.category": "tiny"})
    reference = TorchReference(detector, SIZE)
    for batch in (1, 3):
        frames = noise_frames(batch, SIZE, seed=batch)
        outputs = run_onnx(session(file), frames)
        for frame, found in zip(frames, outputs["anomaly_map"], strict=True):
            expected = reference(frame).anomaly_map
            assert np.abs(found - expected).max() <= BOUNDS["fp32"] * float(np.abs(expected).max())


@pytest.mark.parametrize("precision", BOUNDS)
def test_threshold_is_an_input_with_a_default(files: dict[str, Path], precision: str) -> None:
    runner = session(files[precision])
    frames = noise_frames(1, SIZE)
    default = run_onnx(runner, frames)
    assert np.array_equal(default["mask"].astype(bool), default["anomaly_map"] > np.float32(0.5))
    middle = float(np.median(default["anomaly_map"]))
    for threshold in (-1.0, middle, 1e6):
        outputs = run_onnx(runner, frames, threshold)
        assert np.array_equal(outputs["mask"].astype(bool), outputs["anomaly_map"] > np.float32(threshold))
        assert np.array_equal(outputs["anomaly_map"], default["anomaly_map"])
    assert 0 < run_onnx(runner, frames, middle)["mask"].mean() < 1


def test_the_default_threshold_can_be_patched(files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(files["fp32"].read_bytes())
    frames = noise_frames(1, SIZE)
    middle = float(np.median(run_onnx(session(copy), frames)["anomaly_map"]))
    set_threshold(copy, middle)
    outputs = run_onnx(session(copy), frames)
    assert np.array_equal(outputs["mask"].astype(bool), outputs["anomaly_map"] > np.float32(middle))


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_file_is_what_the_contract_says(files: dict[str, Path], precision: str) -> None:
    model = onnx.load(str(files[precision]))
    assert [(item.domain, item.version) for item in model.opset_import] == [("", OPSET)]
    assert {item.key: item.value for item in model.metadata_props} == {
        "saae.category": "tiny",
        "saae.precision": precision,
    }
    inputs = {item.name: item.type.tensor_type for item in model.graph.input}
    outputs = {item.name: item.type.tensor_type for item in model.graph.output}
    kinds = {name: onnx.TensorProto.DataType.Name(kind.elem_type) for name, kind in (inputs | outputs).items()}
    assert kinds == {
        "frame": "UINT8",
        "threshold": "FLOAT",
        "anomaly_map": "FLOAT",
        "score": "FLOAT",
        "mask": "UINT8",
    }
    shapes = {name: [d.dim_param or d.dim_value for d in kind.shape.dim] for name, kind in (inputs | outputs).items()}
    assert shapes == {
        "frame": ["batch", *SIZE, 3],
        "threshold": [1],
        "anomaly_map": ["batch", *SIZE],
        "score": ["batch"],
        "mask": ["batch", *SIZE],
    }
    assert "threshold" in {item.name for item in model.graph.initializer}
    assert all(item.data_location != onnx.TensorProto.EXTERNAL for item in model.graph.initializer)


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_graph_is_clean(files: dict[str, Path], precision: str) -> None:
    model = onnx.load(str(files[precision]))
    nodes = list(model.graph.node)
    kinds = Counter(node.op_type for node in nodes)
    users = [node for node in nodes if "frame" in node.input]
    assert [node.op_type for node in users] == ["Cast"], "TensorRT wants uint8 cast at once"
    assert [node.op_type for node in nodes[1:3]] == ["Sub", "Reshape"], (
        "the height is resized first, width and channels as one axis"
    )
    # No shape arithmetic, no constants left to fold, nothing that TensorRT's parser has to guess.
    assert not set(kinds) & {
        "Shape",
        "Constant",
        "ConstantOfShape",
        "Expand",
        "Where",
        "Identity",
        "Resize",
        "If",
        "Loop",
    }
    # Two blocks, the encoder, the decoder's cross-attention; its self-attention is a constant.
    assert kinds["Softmax"] == 4
    assert kinds["BatchNormalization"] == 0
    assert len({node.name for node in nodes}) == len(nodes)
    text = files[precision].read_bytes()
    for trace in (b"/site-packages/", b".py", b"stack_trace"):
        assert trace not in text, "the exporter's bookkeeping is still in the file"
    if precision == "fp32":
        assert kinds["Cast"] == 3
        return
    half = onnx.TensorProto.FLOAT16
    stored = {item.name: item.data_type for item in model.graph.initializer}
    for node in nodes:
        if node.op_type in ("LayerNormalization", "ReduceSum", "ReduceMax", "Sqrt", "Conv"):
            assert all(stored.get(name) != half for name in node.input), node.name


@pytest.mark.usefixtures("exported_anew")
def test_the_same_model_gives_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    """In FP16, which has every node of FP32, in the same order, and casts."""
    again = export_onnx(
        FusedGraph(tiny_detector(**KEYWORDS), SIZE, "fp16"), tmp_path / "x.onnx", 0.5, {"saae.category": "tiny"}
    )
    assert again.read_bytes() == files["fp16"].read_bytes()


def test_both_precisions_have_the_same_nodes_but_for_casts(files: dict[str, Path]) -> None:
    names = [
        [node.name for node in onnx.load(str(files[p])).graph.node if node.op_type != "Cast"] for p in ("fp32", "fp16")
    ]
    assert names[0] == names[1]


def test_every_node_of_a_sound_fp16_graph_stays_close(files: dict[str, Path]) -> None:
    frame = noise_frames(1, SIZE)[0]
    rows = compare_nodes(files["fp32"], files["fp16"], frame)
    assert len(rows) > 60
    assert max(row.error for row in rows) < 1e-2
    assert any(row.error > 0 for row in rows)
    assert all(row.error <= 1e-2 for row in rows)


def test_the_node_that_overflows_fp16_is_named(tmp_path: Path) -> None:
    detector = tiny_detector(**KEYWORDS)
    # Finite in FP16 as weights, too large as a product: 65504 is passed in the second block's first MLP layer.
    detector.backbone.blocks[1].mlp.fc1.weight.data.mul_(6e5)
    pair = [
        export_onnx(FusedGraph(detector, SIZE, precision), tmp_path / f"{precision}.onnx", 0.5)
        for precision in ("fp32", "fp16")
    ]
    found = next(row for row in compare_nodes(*pair, noise_frames(1, SIZE)[0]) if not row.error <= 1e-2)
    assert found.node == "block_2/mlp/fc1/MatMul"
    assert found.error == np.inf
    assert found.largest > 65504


def test_graphs_of_different_models_are_not_compared(files: dict[str, Path], tmp_path: Path) -> None:
    other = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"], name="relu")],
            "other",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        )
    )
    onnx.save(other, str(tmp_path / "other.onnx"))
    with pytest.raises(ConfigError, match="no nodes in common"):
        compare_nodes(files["fp32"], tmp_path / "other.onnx", noise_frames(1, SIZE)[0])


@pytest.mark.parametrize("damage", ["cut off", "no UTF-8"])
def test_a_graph_that_cannot_be_read_is_not_compared(files: dict[str, Path], tmp_path: Path, damage: str) -> None:
    data = files["fp16"].read_bytes()
    odd = data[:-1000] if damage == "cut off" else data.replace(b"anomaly_map", b"anomaly_ma\xff")
    (tmp_path / "odd.onnx").write_bytes(odd)
    with pytest.raises(DataError, match=r"odd\.onnx cannot be read"):
        compare_nodes(files["fp32"], tmp_path / "odd.onnx", noise_frames(1, SIZE)[0])


def test_a_damaged_file_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="could not be exported"):
        check_onnx(files["fp32"].read_bytes()[:-1000], SIZE)


def test_a_full_disk_leaves_the_old_file(detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="disk is full"):
        export_onnx(FusedGraph(detector, SIZE), target, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_bytes() == b"old"


def test_onnx_runtime_computes_each_gelu_in_one_pass(files: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(files["fp32"]), options, providers=["CPUExecutionProvider"])
    written = Counter(node.op_type for node in onnx.load(files["fp32"]).graph.node)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert written["Erf"] > 0
    assert found["Erf"] == 0
    assert found["Gelu"] + found["BiasGelu"] == written["Erf"]
