"""Stores weights of an FP32 graph in FP16, cast back at load: little more than half the file, the same arithmetic.

Only the matrices of the backbone's blocks are stored so: nine tenths of the file, and the least sensitive part.
(Rounding the patch projection and the positions as well changed maps four times as much.) Libraries fold the cast of a
constant when they load the graph, and then compute in FP32 as before, with weights rounded to FP16.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from saae_runtime.errors import ConfigError
from saae_runtime.files import write_bytes
from saae_train.model.vgg import is_vgg

from .names import BLOCKS
from .onnx_file import check_onnx

__all__ = ["halve_weights", "require_blocks", "store_half", "whole_weights"]

_LEAST = 1024
"""Smallest tensor that is worth a cast; biases and norms are not changed."""

_ROUNDING = 2.0**-11
"""FP16's relative rounding. A tensor with a larger error, relative to its largest value, stays FP32."""


def require_blocks(backbone: str, layers: Sequence[int] | None) -> None:
    """Check before a fit that a backbone has weights that can be stored in FP16.

    Args:
        backbone: its name.
        layers: the layers used, 0 for a ViT's patch projection; None: the default ones.

    Raises:
        ConfigError: VGG, or a ViT of which only the patch projection is used.
    """
    if is_vgg(backbone) or (layers is not None and max(layers, default=0) < 1):
        taken = "" if is_vgg(backbone) else f" at layers {','.join(map(str, layers or ()))}"
        raise ConfigError(
            f"--half-weights does not fit {backbone}{taken}.",
            "Only weights of transformer blocks are stored in FP16, and it has none.",
            "leave --half-weights out",
        )


def store_half(path: str | os.PathLike[str], frame_size: tuple[int, int]) -> Path:
    """Rewrite an exported FP32 file with its large weights in FP16 (atomically), and check it.

    Args:
        path: written by `saae_export.graph.onnx_file.export_onnx`.
        frame_size: (H, W) of its frames.

    Raises:
        ConfigError: the file has no weight that FP16 could hold, or the rewritten graph does not run.
        StorageError: the file could not be written.
    """
    target = Path(path)
    model = onnx.load(os.fspath(target))
    if halve_weights(model) == 0:
        raise ConfigError(
            f"{target.name} holds no weights that FP16 could store.",
            "Only weights of transformer blocks are; here they are small, out of range, in FP16 already, or missing.",
            "leave --half-weights out",
        )
    data = model.SerializeToString(deterministic=True)
    check_onnx(data, frame_size)
    write_bytes(target, data)
    return target


def halve_weights(model: onnx.ModelProto) -> int:
    """Store the large FP32 weights of a graph in FP16, each followed by a cast to FP32 under its old name.

    Returns:
        How many tensors were changed.
    """
    graph = model.graph
    casts = []
    for item in graph.initializer:
        if item.data_type != TensorProto.FLOAT or BLOCKS.match(item.name) is None:
            continue
        weight = numpy_helper.to_array(item)
        if weight.size < _LEAST:
            continue
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
        # Written so that an infinity stays FP32: comparisons with it are false.
        if not np.abs(half.astype(np.float32) - weight).max() <= _ROUNDING * np.abs(weight).max():
            continue
        name = item.name
        item.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(casts)


def whole_weights(model: onnx.ModelProto) -> int:
    """The inverse of `halve_weights`, except for the rounding: FP32 weights without casts.

    Returns:
        How many tensors were changed.
    """
    graph = model.graph
    halves = {item.name: item for item in graph.initializer if item.name.endswith(".half")}
    kept = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in halves:
            item = halves[node.input[0]]
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), node.output[0]))
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    changed = len(graph.node) - len(kept)
    del graph.node[:]
    graph.node.extend(kept)
    return changed
