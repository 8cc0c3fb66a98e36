"""Exports a FusedGraph to one ONNX file: cleaned, checked, run once by ONNX Runtime, always the same bytes."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.files import write_bytes

from .names import places, weight_name

if TYPE_CHECKING:
    from .fused import FusedGraph

__all__ = ["OPSET", "check_onnx", "export_onnx", "run_onnx", "session", "trace"]

OPSET = 18
_IR_VERSION = 8
"""The IR version of opset 18, the oldest one possible, so that older parsers can read it."""

_INPUTS = ("frame", "threshold")
_OUTPUTS = ("anomaly_map", "score", "mask")
_DOCS = {
    "frame": "camera frames: uint8 N x H x W x 3, RGB",
    "threshold": "pixel threshold T: float32, one number",
    "anomaly_map": "A of equation 3, at the frames' size: float32 N x H x W",
    "score": "largest value of each map: float32 N",
    "mask": "1 where A is above T, else 0: uint8 N x H x W",
}
_PROTOBUF_LIMIT = 2**31 - 1


def export_onnx(
    graph: FusedGraph,
    path: str | os.PathLike[str],
    threshold: float,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the graph as ONNX, opset 18, weights inside, batch dynamic.

    Input `threshold` is an initializer as well, so that callers of ONNX Runtime may leave it out.

    Args:
        graph: the fused graph, in evaluation mode.
        path: the .onnx file (written atomically).
        threshold: default pixel threshold T.
        metadata: written to `metadata_props` beside `saae.precision`.

    Returns:
        The path.

    Raises:
        ConfigError: the graph cannot be exported, fails the checker, or is larger than one ONNX file may be.
        StorageError: the file could not be written.
    """
    target = Path(path)
    model = trace(graph)
    _clean(model)
    _default_threshold(model, threshold)
    properties = {**(metadata or {}), "saae.precision": graph.precision}
    onnx.helper.set_model_props(model, {key: properties[key] for key in sorted(properties)})
    if model.ByteSize() > _PROTOBUF_LIMIT:
        raise ConfigError(
            f"The graph is {model.ByteSize() / 2**30:.1f} GiB.",
            "One ONNX file holds at most 2 GiB, and the bundle keeps each graph in one file.",
            "choose a smaller backbone or fewer layers",
        )
    data = model.SerializeToString(deterministic=True)
    check_onnx(data, graph.frame_size)
    write_bytes(target, data)
    return target


def check_onnx(data: bytes, frame_size: tuple[int, int]) -> None:
    """Run onnx.checker with shape inference, and ONNX Runtime once with two frames.

    Raises:
        ConfigError: either refuses the model, or an output has a wrong shape or type.
    """
    try:
        onnx.checker.check_model(data, full_check=True)
    except Exception as error:
        raise _export_failed(error) from error
    height, width = frame_size
    frames = np.full((2, height, width, 3), 128, np.uint8)
    outputs = run_onnx(session(data), frames)
    expected: dict[str, tuple[tuple[int, ...], type]] = {
        "anomaly_map": ((2, height, width), np.float32),
        "score": ((2,), np.float32),
        "mask": ((2, height, width), np.uint8),
    }
    for name, (shape, kind) in expected.items():
        if outputs[name].shape != shape or outputs[name].dtype != kind:
            raise ConfigError(
                f"The exported graph's output {name} is {outputs[name].dtype} {outputs[name].shape}.",
                f"Expected {np.dtype(kind)} {shape}.",
                "report this with the versions of torch and onnxscript",
            )


def session(model: str | os.PathLike[str] | bytes, threads: int = 0, optimise: bool = False) -> Any:
    """An ONNX Runtime CPU session; only basic rewrites unless told, because fusing an FP16 graph can crash."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_ENABLE_BASIC
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own kinds, one per failure
        raise _export_failed(error) from error


def run_onnx(runner: Any, frames: np.ndarray, threshold: float | None = None) -> dict[str, np.ndarray]:
    """Run uint8 frames N x H x W x 3; `threshold` None takes the graph's own default."""
    feed: dict[str, np.ndarray] = {"frame": frames}
    if threshold is not None:
        feed["threshold"] = np.array([threshold], np.float32)
    names = [item.name for item in runner.get_outputs()]
    return dict(zip(names, runner.run(names, feed), strict=True))


class Traceable(Protocol):
    """A module from frame and threshold to anomaly map, score and mask, for frames of one size."""

    frame_size: tuple[int, int]

    def eval(self) -> Any: ...


def trace(graph: Traceable) -> onnx.ModelProto:
    """Export a module by PyTorch, including the exporter's own rewrites, with a dynamic batch.

    Raises:
        ConfigError: the module cannot be exported.
    """
    height, width = graph.frame_size
    # Two frames: a batch of one would be traced as a constant.
    frames = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    threshold = torch.ones(1, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                (frames, threshold),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(_INPUTS),
                output_names=list(_OUTPUTS),
                dynamic_shapes={"frame": {0: batch}, "threshold": None},
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except SaaeError:
        raise
    except Exception as error:  # the exporter's own errors differ from release to release
        raise _export_failed(error) from error
    if program is None:
        raise _export_failed(RuntimeError("torch.onnx.export returned nothing"))
    return program.model_proto


def _export_failed(error: Exception) -> ConfigError:
    return ConfigError(
        "The fused graph could not be exported to ONNX.",
        f"{type(error).__name__}: {error}",
        "pip install --upgrade torch onnx onnxscript onnxruntime; if it stays, report it with their versions",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress notes and deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _default_threshold(model: onnx.ModelProto, threshold: float) -> None:
    model.graph.initializer.append(_threshold_tensor(threshold))


def _threshold_tensor(threshold: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array([threshold], np.float32), "threshold")


def _clean(model: onnx.ModelProto) -> None:
    """Give readable, stable names; remove stack traces, paths and the exporter's metadata.

    A node is named after its part and its operator ("block_1/attn/qkv/MatMul"), so the FP32 and the FP16 graph have
    the same names except for casts, which `parity.nodes.compare_nodes` relies on.
    """
    graph = model.graph
    keep = {item.name for item in (*graph.input, *graph.output)}
    scopes = [_scope(node) for node in graph.node]
    transformer = any((scope or "").startswith("backbone.blocks") for scope in scopes)
    count: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    for node, place in zip(graph.node, places(graph, scopes), strict=True):
        stem = f"{place}/{node.op_type}" if place else node.op_type
        node.name = f"{stem}_{count[stem]}" if count[stem] else stem
        count[stem] += 1
        for index, output in enumerate(node.output):
            if output and output not in keep:
                renamed[output] = node.name if index == 0 else f"{node.name}:{index}"
        node.doc_string = ""
        del node.metadata_props[:]
    initializers = {item.name for item in graph.initializer}
    for node in graph.node:  # weights keep their module's name; folded constants take that of their first user
        for index, name in enumerate(node.input):
            if name in initializers and name not in renamed and name not in keep:
                folded = name.startswith("val_") or "." not in name
                renamed[name] = f"{node.name}.{'ABCDEFGH'[index]}" if folded else weight_name(name, transformer)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for item in graph.initializer:
        item.name = renamed.get(item.name, item.name)
        item.doc_string = ""
        del item.metadata_props[:]
    used = {name for node in graph.node for name in node.input}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for item in (*graph.input, *graph.output):
        item.doc_string = _DOCS[item.name]
        del item.metadata_props[:]
    graph.name = "saae"
    graph.doc_string = model.doc_string = ""
    model.producer_name, model.producer_version = "saae", ""
    model.ir_version = _IR_VERSION


def _scope(node: onnx.NodeProto) -> str | None:
    """The module path of a node, from the exporter's metadata; None if it has none."""
    for item in node.metadata_props:
        if item.key == "namespace":
            parts = [part.split(":", 1)[0].strip() for part in item.value.split("/")[:-1]]
            return next((part for part in reversed(parts) if part and not part.startswith("_")), "")
    return None
