"""INT8 as explicit QuantizeLinear/DequantizeLinear pairs in an ONNX graph: observe, smooth, insert.

Symmetric throughout, zero points 0, which ONNX Runtime, OpenVINO and TensorRT all take: activations per tensor, weights
per output channel. Only products with a constant weight are quantised; products of two activations (attention), sums,
norms, the resize and the upsample are not quantised. `choose.py` selects the products by measuring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from saae_runtime.progress import Progress, silent

from ..graph.onnx_file import run_onnx, session

__all__ = ["Observed", "insert_qdq", "observe", "run_frames", "smooth", "weighted_products"]

LEVELS = 127
_SAMPLES_PER_FRAME = 30_000
_SMALLEST = 4096
"""Smallest weight that is quantised; for smaller ones, quantising the input costs more than the product."""
_NOT_WEIGHTS = ("anomaly_map/", "pixels/", "features/align/", "patch_embed/", "conv_1/")
"""Not quantised: matrices of resize, upsample and alignment, and the patch projection (pixels need all 8 bits)."""


@dataclass(frozen=True)
class Observed:
    """Statistics of one activation tensor over the calibration frames.

    Attributes:
        channels: float32 C, largest absolute value of each channel (the last axis).
        samples: float32, absolute values of random elements.
    """

    channels: NDArray[np.float32]
    samples: NDArray[np.float32]

    @property
    def largest(self) -> float:
        """The full range, without clipping."""
        return float(max(self.channels.max(), 1e-9))

    def least_squares(self) -> float:
        """The range with the smallest error over the samples; it may clip rare large values."""
        best, chosen = np.inf, self.largest
        for limit in self.largest * np.geomspace(1.0, 0.02, 40):
            step = limit / LEVELS
            rounded = np.minimum(np.rint(self.samples / step), LEVELS) * step
            error = float(np.square(rounded - self.samples).mean())
            if error < best:
                best, chosen = error, float(limit)
        return chosen


def weighted_products(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """The products that can be quantised: node name -> (activation, weight), in the order of the graph.

    Weights that two nodes share are left out.
    """
    weights = {item.name: item for item in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or node.name.startswith(_NOT_WEIGHTS):
            continue
        shape = weights[node.input[1]].dims
        if len(shape) == 2 and int(np.prod(shape)) >= _SMALLEST and readers[node.input[1]] == 1:
            found[node.name] = (node.input[0], node.input[1])
    return found


def run_frames(
    model: onnx.ModelProto, frames: Sequence[NDArray[np.uint8]], tensors: Collection[str] = ()
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Run frames one by one on the CPU; yield the graph's outputs and the named tensors."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    have = {item.name for item in watched.graph.output}
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors if name not in have)
    runner = session(watched.SerializeToString(), optimise=True)
    for frame in frames:
        yield run_onnx(runner, frame[None])


def observe(
    model: onnx.ModelProto,
    frames: Sequence[NDArray[np.uint8]],
    progress: Progress = silent,
) -> dict[str, Observed]:
    """Ranges of every activation that a weighted product reads.

    Args:
        model: the FP32 graph.
        frames: uint8 H x W x 3 at the graph's frame size, of normal images.
        progress: called with (done, total).
    """
    tensors = sorted({activation for activation, _ in weighted_products(model).values()})
    chooser = np.random.default_rng(0)
    channels: dict[str, NDArray[np.float32]] = {}
    samples: dict[str, list[NDArray[np.float32]]] = {name: [] for name in tensors}
    for done, outputs in enumerate(run_frames(model, frames, tensors)):
        for name in tensors:
            values = np.abs(outputs[name]).reshape(-1, outputs[name].shape[-1])
            top = values.max(axis=0)
            channels[name] = np.maximum(channels[name], top) if name in channels else top
            samples[name].append(chooser.choice(values.ravel(), min(values.size, _SAMPLES_PER_FRAME)))
        progress(done + 1, len(frames))
    return {name: Observed(channels[name], np.concatenate(samples[name])) for name in tensors}


def smooth(model: onnx.ModelProto, observed: Mapping[str, Observed], alpha: float = 0.6) -> onnx.ModelProto:
    """Move the spread between channels from activations into weights (SmoothQuant).

    If a LayerNorm feeds only one product, its gain and shift are divided and the product's rows multiplied by
    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (Xiao et al., 2023, eq. 4), so that a few large channels do not reduce
    the resolution of all others. Exact except for rounding.

    Args:
        model: the FP32 graph; copied.
        observed: from `observe`.
        alpha: share of the spread that the weights take.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {item.name: item for item in changed.graph.initializer}
    makers = {output: node for node in changed.graph.node for output in node.output}
    readers = Counter(name for node in changed.graph.node for name in node.input)
    for activation, weight in weighted_products(changed).values():
        maker = makers.get(activation)
        if maker is None or maker.op_type != "LayerNormalization" or readers[activation] != 1:
            continue
        affine = [name for name in maker.input[1:] if name]
        if len(affine) != 2 or any(name not in weights or readers[name] != 1 for name in affine):
            continue
        matrix = numpy_helper.to_array(weights[weight])
        loud = np.maximum(observed[activation].channels, 1e-5)
        heavy = np.maximum(np.abs(matrix).max(axis=1), 1e-8)
        factor = loud**alpha / heavy ** (1.0 - alpha)
        factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
        for name in affine:
            _replace(weights[name], numpy_helper.to_array(weights[name]) / factor)
        _replace(weights[weight], matrix * factor[:, None])
    return changed


def insert_qdq(model: onnx.ModelProto, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """The graph with chosen products quantised.

    Args:
        model: the FP32 graph; copied.
        ranges: product's node name -> range of its activation.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    products = weighted_products(changed)
    constants = {item.name: item for item in changed.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, float], str] = {}
    for node in changed.graph.node:
        if node.name in ranges:
            activation, weight = products[node.name]
            key = (activation, ranges[node.name])
            if key not in made:
                made[key] = _quantise_activation(changed, nodes, activation, ranges[node.name], len(made))
            node.input[0] = made[key]
            node.input[1] = _quantise_weight(changed, nodes, constants[weight])
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(copied)
    used = {name for node in copied for name in node.input} | {item.name for item in changed.graph.input}
    kept = [item for item in changed.graph.initializer if item.name in used]
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    return changed


def _quantise_activation(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], name: str, limit: float, number: int
) -> str:
    stem = f"{name}/int8_{number}"
    _add(model, f"{stem}.scale", np.array(limit / LEVELS, np.float32))
    _add(model, f"{stem}.zero", np.array(0, np.int8))
    scale = [f"{stem}.scale", f"{stem}.zero"]
    nodes.append(helper.make_node("QuantizeLinear", [name, *scale], [f"{stem}.q"], f"{stem}/QuantizeLinear"))
    nodes.append(
        helper.make_node("DequantizeLinear", [f"{stem}.q", *scale], [f"{stem}.dq"], f"{stem}/DequantizeLinear")
    )
    return f"{stem}.dq"


def _quantise_weight(model: onnx.ModelProto, nodes: list[onnx.NodeProto], weight: onnx.TensorProto) -> str:
    matrix = numpy_helper.to_array(weight)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / LEVELS
    name = f"{weight.name}/int8"
    _add(model, f"{name}.q", np.clip(np.rint(matrix / scale), -LEVELS, LEVELS).astype(np.int8))
    _add(model, f"{name}.scale", scale.astype(np.float32))
    _add(model, f"{name}.zero", np.zeros(len(scale), np.int8))
    nodes.append(
        helper.make_node(
            "DequantizeLinear",
            [f"{name}.q", f"{name}.scale", f"{name}.zero"],
            [f"{name}.dq"],
            f"{name}/DequantizeLinear",
            axis=1,
        )
    )
    return f"{name}.dq"


def _add(model: onnx.ModelProto, name: str, value: NDArray[np.generic]) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _replace(tensor: onnx.TensorProto, value: NDArray[np.float32]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
