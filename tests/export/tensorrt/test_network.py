"""An ONNX graph as a TensorRT network: what the parser refuses is named with its cure."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import tiny_graph

from saae_export.tensorrt.compile import compile_engine
from saae_export.tensorrt.network import onnx_for_tensorrt
from saae_runtime.errors import (
    BackendError,
    DataError,
)

# -- parsing


SIZE = (16, 24)


def small_graph(node, inputs, outputs, constants=()):
    values = {name: helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (*inputs, *outputs)}
    graph = helper.make_graph(
        [node],
        "small",
        [values[name] for name, *_ in inputs],
        [values[name] for name, *_ in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


FLOAT, HALF, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8


@pytest.mark.parametrize(
    ("model", "node", "operator", "cure"),
    [
        (
            small_graph(
                helper.make_node("Transpose", ["x"], ["y"], "turn", perm=[0, 3, 1, 2]),
                [("x", UINT8, ["n", 4, 4, 3])],
                [("y", UINT8, None)],
            ),
            "turn",
            "Transpose",
            "cast uint8",
        ),
        (
            small_graph(
                helper.make_node("Resize", ["x", "", "", "size"], ["y"], "shrink", antialias=1, mode="linear"),
                [("x", FLOAT, [1, 3, 8, 8])],
                [("y", FLOAT, None)],
                [("size", np.array([1, 3, 4, 4], np.int64))],
            ),
            "shrink",
            "Resize",
            "constant matrices",
        ),
        (
            small_graph(
                helper.make_node("Add", ["x", "z"], ["y"], "mix"),
                [("x", FLOAT, [1, 3]), ("z", HALF, [1, 3])],
                [("y", FLOAT, None)],
            ),
            "mix",
            "Add",
            "Cast before Add",
        ),
        (
            small_graph(
                helper.make_node("Mystery", ["x"], ["y"], "riddle", domain="nowhere"),
                [("x", FLOAT, [1, 3])],
                [("y", FLOAT, [1, 3])],
            ),
            "riddle",
            "Mystery",
            "does not know Mystery",
        ),
    ],
)
def test_what_the_parser_refuses_is_told_with_node_operator_and_cure(rtx, model, node, operator, cure):
    with pytest.raises(BackendError) as caught:
        compile_engine(rtx, model, name="small.onnx", sms=("sm89",))
    assert "small.onnx" in caught.value.what
    assert f"node '{node}' ({operator})" in caught.value.why
    assert "CUDA driver" not in caught.value.why
    assert cure in caught.value.cure


def test_bytes_that_are_no_graph(rtx, tmp_path):
    with pytest.raises(BackendError) as caught:
        compile_engine(rtx, b"no graph at all", name="small.onnx", sms=("sm89",))
    assert "export it again" in caught.value.cure
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x07\xff\xff")
    with pytest.raises(DataError, match=r"cut\.onnx"):
        onnx_for_tensorrt(tmp_path / "cut.onnx")


@pytest.mark.parametrize("name", ["frame", "anomaly_map", "smooth", "gray", "Conv", "pads"])
def test_names_that_are_no_utf8(tmp_path, name):
    model = tiny_graph(SIZE).replace(name.encode(), name[:-1].encode() + b"\xff")
    (tmp_path / "odd.onnx").write_bytes(model)
    with pytest.raises(DataError, match=r"odd\.onnx") as caught:
        onnx_for_tensorrt(tmp_path / "odd.onnx")
    assert "not UTF-8" in caught.value.why
