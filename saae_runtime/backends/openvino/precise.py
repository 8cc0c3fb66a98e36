"""Parts of a graph that stay FP32 when OpenVINO computes in bf16: the stream of features, and all that makes the score.

OpenVINO rounds every tensor to bf16 except what leads from the last products to a result. So each tensor that shall
not be rounded is made a result of the model, which nobody reads. The search in the memory would then be FP32 as well,
which costs time and finds the same entries; it is marked to be rounded in any case.
"""

from __future__ import annotations

from typing import Any

__all__ = ["keep_precise", "round_the_search"]

STANDARDISED = "space/Add"
"""The standardised features of a graph (`saae_export.graph.names`): before it lies the residual stream of the ViT."""

_ROUNDED = "enforceBF16evenForGraphTail"
"""OpenVINO's mark of an operation that is rounded although it leads to a result."""

_MAP = "anomaly_map"
_SHAPING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "MatMul")


def keep_precise(model: Any) -> list[str]:
    """Make results of the patch scores and the standardised features of an `openvino.Model`, in place.

    Graphs of earlier releases stay as they are, since their thresholds were calibrated that way: there the upsample
    has a constant on the right, which is rounded whatever the rest is.

    Returns:
        The names of these tensors.
    """
    scores = _patch_scores(model)
    if scores is None:
        return []
    kept = [output for operation in model.get_ordered_ops() for output in operation.outputs() if _is_features(output)]
    found = model.add_outputs([*kept, scores])
    return [item.node.input_value(0).node.get_friendly_name() for item in found]


def round_the_search(model: Any, rounded: bool = True) -> None:
    """Mark the operations that choose what is gathered from the memory, up to the product with its entries, in place.

    Args:
        model: an `openvino.Model`.
        rounded: False takes the marks off again, for a release that does not know them.
    """
    seen: set[str] = set()
    left = [
        operation.input_value(1).get_node()
        for operation in model.get_ordered_ops()
        if operation.get_type_name() == "GatherND"
    ]
    while left:
        operation = left.pop()
        if operation.get_friendly_name() in seen or operation.get_type_name() in ("MatMul", "Parameter", "Constant"):
            continue
        seen.add(operation.get_friendly_name())
        if rounded:
            operation.get_rt_info()[_ROUNDED] = "true"
        elif _ROUNDED in operation.get_rt_info():
            del operation.get_rt_info()[_ROUNDED]
        left += [operation.input_value(place).get_node() for place in range(operation.get_input_size())]


def _is_features(output: Any) -> bool:
    return STANDARDISED in output.names


def _patch_scores(model: Any) -> Any:
    """What the first product of the upsample multiplies; None if not all have their constant on the left."""
    value = next(item.node.input_value(0) for item in model.outputs if _MAP in item.names)
    scores = None
    while value.node.get_type_name() in _SHAPING:
        node = value.node
        if node.get_type_name() == "MatMul":
            if node.input_value(0).node.get_type_name() != "Constant":
                return None
            value = scores = node.input_value(1)
        else:
            value = node.input_value(0)
    return scores
