"""The graph that Triton serves: frame in, anomaly map and score out, without threshold and mask."""

from __future__ import annotations

import os

from saae_runtime.errors import BackendUnavailableError, ConfigError

from ..artefacts import load_graph

__all__ = ["OUTPUTS", "serving_graph"]

OUTPUTS = ("anomaly_map", "score")


def serving_graph(path: str | os.PathLike[str]) -> bytes:
    """A bundle's graph without the input `threshold`, the output `mask`, and the nodes that only they need.

    Triton's ONNX backend cannot batch with an optional input, so the client compares with T. All other nodes, weights
    and metadata are unchanged, and so are the results.

    Args:
        path: an ONNX file as `saae_export.graph.onnx_file.export_onnx` writes it.

    Returns:
        The serialized model, the same bytes every time.

    Raises:
        BackendUnavailableError: the package onnx is not installed.
        DataError: the file cannot be read as ONNX.
        ConfigError: a graph with other inputs or outputs.
    """
    try:
        import onnx  # not at the top: other commands work without it
    except ImportError as error:
        raise BackendUnavailableError(
            "A graph for Triton is made by the package onnx.", str(error), "pip install onnx"
        ) from error
    model = load_graph(path)
    graph = model.graph
    kept = [item for item in graph.output if item.name in OUTPUTS]
    if {item.name for item in kept} != set(OUTPUTS) or "frame" not in {item.name for item in graph.input}:
        raise ConfigError(
            f"{path} is not a graph of saae.",
            f"It has no input `frame`, or lacks an output of {', '.join(OUTPUTS)}.",
            "give a bundle that `saae-export build` wrote",
        )
    needed = {item.name for item in kept}
    nodes = []
    for node in reversed(graph.node):  # nodes are in topological order
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    nodes.reverse()
    if "threshold" in needed:
        raise ConfigError(
            f"{path}: the map or the score depends on the threshold.", "", "export it again: saae-export build"
        )
    inputs = [item for item in graph.input if item.name in needed]
    weights = [item for item in graph.initializer if item.name in needed]
    for field, items in (
        (graph.node, nodes),
        (graph.input, inputs),
        (graph.output, kept),
        (graph.initializer, weights),
    ):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))
