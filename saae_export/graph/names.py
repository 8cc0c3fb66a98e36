"""Names of an exported graph's nodes, tensors and weights: the paper's parts, grouped by slashes as viewers show them.

`pixels` (frame to the model's input), `patch_embed`, `block_1` ... (of VGG `conv_1` ...), `features` (what is stacked),
`space` (standardisation, components), `ce` and `cd` (the convolutional encoder and decoder), `te` and `td` (the
transformer's), `residual` (the score of each patch), `anomaly_map`, `score` and `mask`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx

__all__ = ["BLOCKS", "places", "weight_name"]

BLOCKS = re.compile(r"block_\d+/")
"""Prefix of the names of a transformer block of the backbone."""

_STACKING = ("Concat", "Flatten", "Reshape", "Transpose")
_CONV_OF_SAAE = re.compile(r"conv(\d)(.*)")


def places(graph: onnx.GraphProto, scopes: Sequence[str | None]) -> list[str]:
    """The part of the model that each node belongs to.

    Args:
        graph: the nodes, in their order.
        scopes: each node's module path; empty for the fused graph itself, None for nodes made by a rewrite rule.
    """
    transformer = any((scope or "").startswith("backbone.blocks") for scope in scopes)
    found: list[str] = []
    made: dict[str, str] = {}  # tensor -> part
    after_blocks = False
    for node, scope in zip(graph.node, scopes, strict=True):
        before = next((made[name] for name in node.input if name in made), "")
        if scope is None:  # it belongs to the part that made its input
            place = before
        else:
            after_blocks |= scope.startswith(("backbone.blocks", "backbone.convs"))
            place = _place(scope, transformer)
            if scope == "backbone":
                if transformer:
                    place = "features" if after_blocks else "patch_embed"
                elif after_blocks and node.op_type in _STACKING:
                    place = "features"
                else:  # nodes between convolutions belong to the one before
                    place = before if before.startswith("conv_") else "conv_1"
            elif scope == "saae":  # nodes between its parts belong to the part before
                place = before.split("/")[0] if before.split("/")[0] in ("ce", "te", "td", "cd") else "ce"
        found.append(place)
        made.update((name, place) for name in node.output if place)
    return _placed_by_readers(graph, found)


def _placed_by_readers(graph: onnx.GraphProto, found: list[str]) -> list[str]:
    """Nodes without a module are named after their result: an output of the graph, or the input of the next part."""
    outputs = {item.name for item in graph.output}
    readers: dict[str, str] = {}
    for index in reversed(range(len(found))):
        node = graph.node[index]
        if not found[index]:
            named = next((name for name in node.output if name in outputs), "")
            read = next((readers[name] for name in node.output if name in readers), "")
            found[index] = named or read.split("/")[0]
        readers.update((name, found[index]) for name in node.input)
    return found


def weight_name(name: str, transformer: bool) -> str:
    """The exported name of a module's weight: `backbone.blocks.0.norm1.weight` becomes block_1/norm1.weight."""
    path, _, leaf = name.rpartition(".")
    if not path:
        return name
    group = "patch_embed" if transformer else "conv_1"
    place = group if path == "backbone" else "ce" if path == "saae" else _place(path, transformer)
    return f"{place}.{leaf}"


def _place(scope: str, transformer: bool) -> str:
    """A module path in the paper's words."""
    head, _, rest = scope.partition(".")
    if head == "backbone":
        part, _, rest = rest.partition(".")
        if part == "blocks":
            number, _, rest = rest.partition(".")
            return _joined(f"block_{int(number) + 1}", rest)
        if part == "convs":
            number, _, rest = rest.partition(".")
            return _joined(f"conv_{int(number) + 2}", rest)
        if part == "proj" and not transformer:
            return _joined("conv_1", rest)
        return _joined("patch_embed" if transformer else "features", part, rest)
    if head == "saae":
        part, _, rest = rest.partition(".")
        conv = _CONV_OF_SAAE.fullmatch(part)
        if conv:
            return _joined("ce" if int(conv[1]) <= 3 else "cd", part, rest)
        return _joined(
            *{"embed": ("ce", "embed"), "encoder": ("te",), "decoder": ("td",)}.get(part, ("ce", part)), rest
        )
    return _joined({"anomaly": "residual", "map": "anomaly_map"}.get(head, head), rest)


def _joined(*parts: str) -> str:
    return "/".join(part.replace(".", "/") for part in parts if part)
