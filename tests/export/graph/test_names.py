"""Names after the paper: unique, grouped, in its order, and none left in the words of the code."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import onnx
import pytest
from tiny_models import tiny_detector

from saae_export.graph.fused import FusedGraph
from saae_export.graph.names import weight_name
from saae_export.graph.onnx_file import export_onnx

VIT = ["pixels", "patch_embed", "block_1", "block_2", "features", "space", "ce", "te", "td", "cd", "residual"]
ENDS = {"anomaly_map", "score", "mask"}
VGG = {"name": "vgg19", "size": (32, 48), "layers": (1, 3, 6), "patch": 2, "components": 48, "score": "joint"}


def exported(
    folder: Path, precision: str = "fp32", frame_size: tuple[int, int] = (80, 100), **options: object
) -> onnx.ModelProto:
    graph = FusedGraph(tiny_detector(**options), frame_size, precision)  # type: ignore[arg-type]
    return onnx.load(export_onnx(graph, folder / "model.onnx", 0.5))


def groups(model: onnx.ModelProto) -> list[str]:
    """The first part of each node's name, in the graph's order, without repeats beside each other."""
    return [name for name, _ in groupby(node.name.split("/")[0] for node in model.graph.node)]


def check(model: onnx.ModelProto) -> None:
    nodes = [node.name for node in model.graph.node]
    assert len(set(nodes)) == len(nodes)
    assert all("/" in name for name in nodes), [name for name in nodes if "/" not in name]
    tensors = [name for node in model.graph.node for name in node.output]
    tensors += [item.name for item in (*model.graph.initializer, *model.graph.input)]
    assert len(set(tensors)) == len(tensors) - 1  # `threshold` is an input and has a default
    words = ("backbone", "saae", "val_", "anomaly.", "map.", "node_")
    assert [name for name in (*nodes, *tensors) if name.startswith(words)] == []
    known = {name.split("/")[0] for name in nodes}
    weights = {item.name for item in model.graph.initializer} - {"threshold"}
    assert {name.split("/")[0].split(".")[0] for name in weights} <= known


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parts_come_in_the_papers_order(tmp_path: Path, precision: str) -> None:
    model = exported(tmp_path, precision, components=48, smoothing=0.5, score="cosine")
    check(model)
    found = groups(model)
    body = found[: len(found) - next(i for i, name in enumerate(reversed(found)) if name not in ENDS)]
    assert list(dict.fromkeys(body)) == VIT
    assert len(body) == len(VIT), body  # each part stands together
    assert set(found[len(body) :]) == ENDS
    outputs = {item.name: item.doc_string for item in model.graph.output}
    assert "float32 N x H x W" in outputs["anomaly_map"]
    named = {node.name for node in model.graph.node}
    assert {"block_1/attn/qkv/MatMul", "te/attention/qkv/MatMul", "td/key_value/MatMul"} <= named
    assert {"patch_embed/proj/MatMul", "ce/conv1/MatMul", "cd/conv6/MatMul", "space/basis/MatMul"} <= named


def test_with_a_memory(tmp_path: Path) -> None:
    model = exported(tmp_path, components=48, smoothing=0.5, score="memory", memory=14)
    check(model)
    assert any(node.name.startswith("residual/memory/") for node in model.graph.node)


def test_without_a_transformer(tmp_path: Path) -> None:
    model = exported(tmp_path, transformer=False)
    check(model)
    found = set(groups(model))
    assert {"ce", "cd"} <= found
    assert not found & {"te", "td"}


def test_of_vgg(tmp_path: Path) -> None:
    model = exported(tmp_path, frame_size=(40, 60), smoothing=0.5, **VGG)  # which test_vgg.py exports, too
    check(model)
    found = groups(model)
    assert found[:4] == ["pixels", "conv_1", "features", "conv_2"]  # a map of a layer is aligned where it is made
    assert {"conv_3", "features", "space", "ce", "te", "td", "cd", "residual"} <= set(found)
    assert "patch_embed" not in found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.blocks.0.norm1.weight", "block_1/norm1.weight"),
        ("backbone.blocks.11.attn.qkv.bias", "block_12/attn/qkv.bias"),
        ("backbone.position", "patch_embed.position"),
        ("saae.conv2.bias", "ce/conv2.bias"),
        ("saae.conv5.bias", "cd/conv5.bias"),
        ("saae.decoder.query", "td.query"),
        ("saae.position_table", "ce.position_table"),
        ("map.rows", "anomaly_map.rows"),
        ("threshold", "threshold"),
        ("something.new.weight", "something/new.weight"),
    ],
)
def test_weights(name: str, expected: str) -> None:
    assert weight_name(name, transformer=True) == expected
