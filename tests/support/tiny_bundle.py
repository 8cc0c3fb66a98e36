"""A small but whole bundle for tests: a real ONNX graph with the fused graph's inputs and outputs, and no torch.

The graph's anomaly map is the mean absolute difference of a pixel's channels from mid-gray (128), smoothed over 3 x 3
pixels; so a gray frame scores 0 and a bright or dark spot stands out where it is. `expected_map` is the same in numpy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from needs import need

from saae_runtime.bundle import write_bundle
from saae_runtime.manifest import (
    Artefact,
    Backbone,
    Calibration,
    Frame,
    Manifest,
    Model,
    Thresholds,
)
from saae_runtime.thresholds import ThresholdTable

CATEGORY = "tiny"


def tiny_graph(size: tuple[int, int] = (64, 96), threshold: float = 40.0, precision: str = "fp32") -> bytes:
    """The ONNX graph: `frame` uint8 [N, H, W, 3], `threshold` float32 [1] (with a default) -> map, score, mask."""
    onnx = need("onnx")  # late: what needs no graph runs without it
    helper, numpy_helper, TensorProto = need("onnx.helper"), need("onnx.numpy_helper"), onnx.TensorProto
    height, width = size
    real = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[precision]
    dtype = {"fp32": np.float32, "fp16": np.float16}[precision]
    constants = [
        numpy_helper.from_array(np.array([128.0], dtype), "gray"),
        numpy_helper.from_array(np.full((1, 3, 3, 3), 1 / 27, dtype), "kernel"),
        numpy_helper.from_array(np.array([1], np.int64), "channel"),
        numpy_helper.from_array(np.array([threshold], np.float32), "threshold"),
    ]
    nodes = [
        helper.make_node("Cast", ["frame"], ["real"], to=real),
        helper.make_node("Transpose", ["real"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "gray"], ["centred"]),
        helper.make_node("Abs", ["centred"], ["distance"]),
        helper.make_node("Conv", ["distance", "kernel"], ["smooth"], pads=[1, 1, 1, 1]),
        helper.make_node("Squeeze", ["smooth", "channel"], ["plane"]),
        helper.make_node("Cast", ["plane"], ["anomaly_map"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["anomaly_map", "axes"], ["score"], keepdims=0),
        helper.make_node("Greater", ["anomaly_map", "threshold"], ["above"]),
        helper.make_node("Cast", ["above"], ["mask"], to=TensorProto.UINT8),
    ]
    constants.append(numpy_helper.from_array(np.array([1, 2], np.int64), "axes"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("frame", TensorProto.UINT8, ["batch", height, width, 3]),
            helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", height, width]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("mask", TensorProto.UINT8, ["batch", height, width]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"saae.category": CATEGORY, "saae.precision": precision, "saae.schema": "1"})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def expected_map(frame: np.ndarray) -> np.ndarray:
    """What the graph computes for one uint8 H x W x 3 frame at its own size, in numpy: float32 H x W."""
    distance = np.abs(frame.astype(np.float32) - 128.0).mean(axis=2)
    padded = np.pad(distance, 1)
    height, width = distance.shape
    windows = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.mean(windows, axis=0, dtype=np.float32)


def tiny_manifest(
    size: tuple[int, int] = (64, 96), threshold: float = 40.0, precisions: tuple[str, ...] = ("fp32",)
) -> Manifest:
    """A manifest for the tiny graph; both thresholds are `threshold` at the default rate and 1.5 times it at rate 0."""
    height, width = size
    table = ThresholdTable(
        fpr=(0.0, 0.001, 0.01, 1.0),
        threshold=(1.5 * threshold, threshold, 0.5 * threshold, 0.0),
        default_fpr=0.001,
        count=1_000_000,
    )
    names = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "bf16": "model.onnx"}
    return Manifest(
        saae_version="0.1.0",
        created="2025-01-01T00:00:00Z",
        category=CATEGORY,
        synthetic=True,
        frame=Frame(height, width, baked=False),
        model=Model(height, width, 8, (height // 8, width // 8), 12, (0, 1), None, "l2", "l2", "test", {"seed": 0}),
        backbone=Backbone("none", "test", "0" * 64),
        thresholds={precision: Thresholds(table, table) for precision in precisions},
        calibration=Calibration(images=10, digest="0" * 64, held_out=True),
        artefacts=tuple(Artefact(names[precision], "onnx", precision) for precision in precisions),
        tools={"onnx": "1.16.0"},
    )


def make_tiny_bundle(
    path: str | Path,
    size: tuple[int, int] = (64, 96),
    threshold: float = 40.0,
    precisions: tuple[str, ...] = ("fp32",),
) -> Path:
    """Writes the tiny bundle.

    Args:
        path: the folder to write.
        size: (height, width) of the graph's frame.
        threshold: pixel and image threshold at the default false-positive rate.
        precisions: some of `fp32`, `fp16` and `bf16`.

    Returns:
        The folder.
    """
    manifest = tiny_manifest(size, threshold, precisions)
    types = {"bf16": "fp32"}  # the same file
    files = {
        item.file: tiny_graph(size, threshold, types.get(item.precision, item.precision)) for item in manifest.artefacts
    }
    return write_bundle(path, manifest, files).path


def gray_frame(size: tuple[int, int] = (64, 96), spot: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """A mid-gray uint8 H x W x 3 frame (score 0); `spot` = (top, left, height, width) is painted white (score 127)."""
    frame = np.full((*size, 3), 128, np.uint8)
    if spot is not None:
        top, left, height, width = spot
        frame[top : top + height, left : left + width] = 255
    return frame
