"""Finds where an FP16 graph departs from its FP32 graph: compares all inner values on one frame, in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from saae_runtime.errors import ConfigError

from ..artefacts import load_graph
from ..graph.onnx_file import run_onnx, session

__all__ = ["Divergence", "compare_nodes"]

_MOVERS = frozenset(
    {"Cast", "Concat", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
)
"""Operators that only move values and cannot be the cause."""


@dataclass(frozen=True)
class Divergence:
    """One node compared between two graphs.

    Attributes:
        node: its name, the same in both graphs ("block_1/attn/qkv/MatMul").
        operator: ONNX operator.
        error: largest |a - b| over the node's output, relative to the largest |a|; infinite if b is not finite.
        largest: largest |a| in FP32; above 65504 it cannot be held in FP16.
        position: place in the FP32 graph's order, from 0.
    """

    node: str
    operator: str
    error: float
    largest: float
    position: int


def compare_nodes(
    onnx_fp32: str | os.PathLike[str], onnx_fp16: str | os.PathLike[str], frame: NDArray[np.uint8]
) -> list[Divergence]:
    """Compare all computing nodes that both graphs have, on ONNX Runtime's CPU provider.

    Args:
        onnx_fp32: the reference graph.
        onnx_fp16: the graph to examine, exported from the same model.
        frame: uint8 H x W x 3 of the graphs' frame size.

    Returns:
        One entry per node, in the order of the FP32 graph.

    Raises:
        DataError: one of them is not ONNX.
        ConfigError: the graphs have no nodes in common, or cannot be run.
    """
    reference, suspect = load_graph(onnx_fp32), load_graph(onnx_fp16)
    theirs = {node.name: node for node in suspect.graph.node}
    common = [
        (position, node)
        for position, node in enumerate(reference.graph.node)
        if node.op_type not in _MOVERS and node.name in theirs and theirs[node.name].op_type == node.op_type
    ]
    if not common:
        raise ConfigError(
            f"{onnx_fp32} and {onnx_fp16} have no nodes in common.",
            "They were not exported from one model by saae.",
            "export both again: saae-export onnx",
        )
    expected = _inner_values(reference, [node.output[0] for _, node in common], frame)
    found = _inner_values(suspect, [theirs[node.name].output[0] for _, node in common], frame)
    rows = []
    for position, node in common:
        a, b = expected[node.output[0]], found[theirs[node.name].output[0]]
        if a.dtype.kind != "f":
            continue
        error, largest = _relative_error(a, b)
        rows.append(Divergence(node.name, node.op_type, error, largest, position))
    return rows


def _inner_values(
    model: onnx.ModelProto, names: Sequence[str], frame: NDArray[np.uint8]
) -> dict[str, NDArray[np.floating]]:
    present = {item.name for item in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return run_onnx(session(model.SerializeToString()), frame[None])


def _relative_error(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[float, float]:
    largest = float(np.abs(a, dtype=np.float64).max(initial=0.0))
    if not np.isfinite(b).all():
        return float("inf"), largest
    difference = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
    return difference / max(largest, 1e-12), largest
