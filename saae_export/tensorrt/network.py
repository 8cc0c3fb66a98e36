"""Parses an ONNX graph as a strongly typed TensorRT network; errors name the node."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saae_runtime.backends.tensorrt.library import TensorInfo, TrtLibrary
from saae_runtime.errors import BackendError, BackendUnavailableError

from ..artefacts import load_graph

__all__ = ["NetworkInfo", "network_info", "onnx_for_tensorrt", "parse_network"]

# Parser errors and their cures. {op} is the node's operator, {title} the library.
_CURES = (
    (r"UInt8 but must have type", "cast uint8 to float before {op}; graphs of saae-export do, export this one again"),
    (r"[Aa]ntialias", "export the graph with saae-export: it resizes by two constant matrices, not by {op}"),
    (r"same input types|types Float and Half|types Half and Float", "put a Cast before {op}: types never mix silently"),
    (r"[Zz]ero ?[Pp]oint", "quantise {op} symmetrically: int8 with zero points of 0; {title} takes no others"),
    (r"input has type Int32 but must have type FP8", "leave biases unquantised: {title} takes no int32 {op}"),
    (r"Plugin not found", "{title} does not know {op}: use a newer release, or run the ONNX file with onnxruntime"),
    (r"ParseFromCodedStream|DESERIALIZE", "the file is not an ONNX graph, or is truncated: export it again"),
    (r"Int64|INT64", "give {op} int32 or float inputs where the graph allows it"),
)


@dataclass(frozen=True)
class NetworkInfo:
    """Inputs and outputs of a parsed network, before it is compiled.

    Attributes:
        inputs, outputs: -1 is a free dimension.
        layers: number of layers.
        dtypes: number of layers by output type, for instance {"float16": 210, "float32": 45}.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: int
    dtypes: Mapping[str, int]


def onnx_for_tensorrt(path: str | os.PathLike[str]) -> bytes:
    """The graph with inputs that have a default turned into real inputs.

    ONNX Runtime takes `threshold` from an initializer when it is not given; TensorRT would build that value in, and
    a new threshold would need a new engine.

    Raises:
        DataError: the file cannot be read as ONNX.
        BackendUnavailableError: the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401  not at the top: doctor works on machines that only run bundles
    except ImportError as error:
        raise BackendUnavailableError(
            "An engine is built from ONNX, which needs the package onnx.", str(error), "pip install onnx"
        ) from error
    model = load_graph(path)
    inputs = {item.name for item in model.graph.input}
    kept = [item for item in model.graph.initializer if item.name not in inputs]
    if len(kept) != len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    return bytes(model.SerializeToString())


def parse_network(library: TrtLibrary, builder: Any, model: bytes, name: str) -> tuple[Any, Any]:
    """Parse a graph.

    Args:
        library: the loaded flavour.
        builder: its builder.
        model: the serialized graph.
        name: the file's name, for messages.

    Returns:
        The network and the parser; the parser owns memory that the network uses.

    Raises:
        BackendError: the library does not support an operator, attribute or type; lists every finding with its node.
    """
    network = library.strongly_typed_network(builder)
    parser = library.module.OnnxParser(network, library.logger)
    library.take_messages()
    if parser.parse(model):
        library.take_messages()
        return network, parser
    findings, cures = [], []
    for index in range(parser.num_errors):
        finding, cure = _finding(parser.get_error(index), library)
        findings.append(finding)
        cures.append(cure)
    library.take_messages()
    raise BackendError(
        f"{library.title} does not take {name}.",
        "; ".join(findings) or "The parser gave no reason.",
        "; ".join(dict.fromkeys(cure for cure in cures if cure))
        or "run the ONNX file with onnxruntime, or use a newer release of the library",
    )


def network_info(library: TrtLibrary, network: Any) -> NetworkInfo:
    """Inputs, outputs and types of a parsed network."""
    dtypes: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs:
            dtypes[_type_name(library, layer.get_output(0).dtype)] += 1
    return NetworkInfo(
        inputs=tuple(_tensor(library, network.get_input(index), True) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(library, network.get_output(index), False) for index in range(network.num_outputs)),
        layers=network.num_layers,
        dtypes=dict(dtypes),
    )


def _type_name(library: TrtLibrary, dtype: Any) -> str:
    try:
        return np.dtype(library.module.nptype(dtype)).name
    except TypeError:  # numpy has no bfloat16 or fp8
        return str(dtype).rpartition(".")[2].lower()


def _tensor(library: TrtLibrary, tensor: Any, is_input: bool) -> TensorInfo:
    dtype = np.dtype(library.module.nptype(tensor.dtype))
    return TensorInfo(tensor.name, tuple(int(side) for side in tensor.shape), dtype, is_input)


def _finding(error: Any, library: TrtLibrary) -> tuple[str, str]:
    operator, node = error.node_operator() or "", error.node_name() or ""
    # Without a GPU the library adds unrelated errors about the driver.
    lines = [line for line in error.desc().splitlines() if "CUDA driver" not in line and line.strip() != node]
    lines = [line for line in lines if not line.startswith("Invalid Node")] or lines
    text = " ".join(" ".join(lines).split()) or str(error.code())
    where = f"node {node!r} ({operator}): " if operator else ""
    for pattern, cure in _CURES:
        if re.search(pattern, text):
            return where + text, cure.format(op=operator or "the node", title=library.title)
    return where + text, ""
