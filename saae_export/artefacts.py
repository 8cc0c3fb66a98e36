"""Artefacts of a bundle: their file names, manifest entries, engines and default thresholds.

Needs no PyTorch, and onnx only for `load_graph`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saae_runtime.backends.graph import with_default
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import ConfigError, DataError
from saae_runtime.files import write_bytes
from saae_runtime.manifest import IN_BF16, Artefact

__all__ = [
    "CPU",
    "OPENVINO",
    "STORED_HALF",
    "load_graph",
    "onnx_artefact",
    "onnx_file",
    "open_artefact",
    "set_threshold",
    "stores_half",
    "with_threshold",
]

CPU = "onnxruntime:cpu"
"""The backend for calibrating and comparing what every machine can run."""

OPENVINO = "openvino"
"""The backend for calibrating and comparing bf16, which only this one computes."""


STORED_HALF: Mapping[str, Any] = {"weights": "fp16"}
"""The `options` of a graph whose weights are stored in FP16."""


def onnx_file(precision: str) -> str:
    """The graph's file name in a bundle: model.onnx, model.fp16.onnx, model.int8.onnx.

    The bf16 precisions have no file of their own: OpenVINO computes the FP32 and the INT8 graph in bf16, too.
    """
    graph = {"bf16": "fp32", "int8-bf16": "int8"}.get(precision, precision)
    return "model.onnx" if graph == "fp32" else f"model.{graph}.onnx"


def onnx_artefact(precision: str, half_weights: bool = False) -> Artefact:
    """The manifest's entry for the graph of a precision, not compared yet."""
    file = onnx_file(precision)
    return Artefact(file, "onnx", precision, options=STORED_HALF if half_weights and file == onnx_file("fp32") else {})


def load_graph(path: str | os.PathLike[str]) -> Any:
    """An ONNX file as the onnx package's ModelProto; needs that package.

    Raises:
        DataError: the file is not ONNX, or a name in the graph is not UTF-8, on which libraries fail later.
    """
    import onnx

    cure = "export it again: saae-export build"
    try:
        model = onnx.load(Path(path))
    except Exception as error:  # protobuf raises several unrelated types
        raise DataError(f"{path} cannot be read as ONNX.", str(error), cure) from error
    graph = model.graph
    names = [item.name for item in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [item.name for item in node.attribute]
    for name in names:
        if isinstance(name, bytes):  # protobuf's value for text that is not UTF-8
            raise DataError(f"{path} cannot be read as ONNX.", f"The name {name!r} in it is not UTF-8.", cure)
    return model


def stores_half(artefact: Artefact) -> bool:
    """Whether the artefact is a graph that stores its weights in FP16 and computes in FP32 or bf16."""
    return artefact.kind == "onnx" and artefact.options.get("weights") == STORED_HALF["weights"]


def open_artefact(bundle: Bundle, artefact: Artefact) -> Engine:
    """An engine that runs exactly this artefact.

    Raises:
        BackendError: it cannot run here.
    """
    backend = str(artefact.library)
    if artefact.kind == "onnx":
        backend = OPENVINO if artefact.precision in IN_BF16 else CPU
    return Engine(bundle.only(artefact), backend=backend, precision=artefact.precision, verify=False, cache=False)


def with_threshold(path: str | os.PathLike[str], threshold: float) -> bytes:
    """An exported file with another default threshold; nothing else is changed.

    Raises:
        ConfigError: not a graph that `export_onnx` wrote.
    """
    try:
        return with_default(Path(path).read_bytes(), "threshold", threshold)
    except ValueError as error:
        raise ConfigError(f"{path} has no default threshold.", f"It was not exported by saae: {error}.", "") from error


def set_threshold(path: str | os.PathLike[str], threshold: float) -> None:
    """Replace the default threshold of an exported file (atomically); nothing else is changed.

    Raises:
        ConfigError: not a graph that `export_onnx` wrote.
        StorageError: the file could not be written.
    """
    write_bytes(path, with_threshold(path, threshold))
