"""Chooses the ONNX graph of a bundle for a backend."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle import Bundle
from ..manifest import IN_BF16, Artefact

__all__ = ["no_graph", "pick_graph"]

_BUILT = {
    "fp32": "--precision fp32",
    "fp16": "--precision fp32,fp16",
    "bf16": "--precision fp32,bf16",
    "int8": "--int8",
    "int8-bf16": "--int8",
}


def pick_graph(bundle: Bundle, able: Sequence[str], precision: str | None) -> Artefact | None:
    """The first graph with a precision that a backend supports, the preferred ones first.

    A graph that failed its comparison is only used if its precision is named.

    Args:
        bundle: an opened bundle.
        able: supported precisions, the preferred ones first.
        precision: only this one; None for any.
    """
    for wanted in able if precision is None else [item for item in able if item == precision]:
        for artefact in bundle.artefacts(kind="onnx", precision=wanted):
            if precision is not None or artefact.parity is None or artefact.parity.passed:
                return artefact
    return None


def no_graph(bundle: Bundle, precision: str | None) -> tuple[str, str]:
    """Why a bundle has no graph for a backend, and what to type."""
    held = [artefact.precision for artefact in bundle.artefacts(kind="onnx")]
    if precision in IN_BF16 and precision in held:
        return (
            f"only OpenVINO computes in {precision}, on a device that has bf16",
            "leave precision= out, or backend='openvino' on a processor with bf16",
        )
    if precision is not None:
        why = f"the bundle has no {precision} ONNX file (it has: {', '.join(held) or 'none'})"
        return why, f"leave precision= out, or build it: saae-export build {_BUILT[precision]}"
    why = f"the bundle has no ONNX file for it that passed its parity check (it has: {', '.join(held) or 'none'})"
    return why, f"rebuild the bundle, or name the precision: precision={(held or ['fp32'])[0]!r}"
