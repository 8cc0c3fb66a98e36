"""Parts of a graph that stay FP32 when OpenVINO computes in bf16: the stream of features, and all that makes the score.

OpenVINO rounds every tensor to bf16 except what leads from the last products to a result. So each tensor that shall
not be rounded is made a result of the model, which nobody reads.
"""

from __future__ import annotations

from typing import Any

__all__ = ["keep_precise"]

STANDARDISED = "space/Add"
"""The standardised features of a graph (`saae_export.graph.names`): before it lies the residual stream of the ViT."""

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
