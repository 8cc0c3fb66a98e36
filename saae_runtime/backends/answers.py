"""Compares a backend's results with those in the bundle, so that `auto` never chooses a backend that is wrong here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..bundle import Bundle
from ..errors import BundleCorruptError
from ..manifest import Artefact
from ..reference import ReferenceFrame, read_reference
from .base import Backend

__all__ = ["answer_check"]

_TINY = 1e-12


def answer_check(bundle: Bundle) -> Callable[[Backend, Artefact], str]:
    """Return a check of an opened backend. It says what is wrong with the answers; "" if they are right or unknown.

    Each reference frame is scored alone. The bounds are those that the artefact had to keep when the bundle was built
    (`Parity.bound_map`, `Parity.bound_score`); an engine that was not compared, because it was compiled elsewhere, has
    those of its graph. A library, driver or processor that the build did not see may compute
    the same file differently.
    """
    stored: list[ReferenceFrame] | None = None
    graphs = {item.precision: item.parity for item in bundle.artefacts(kind="onnx")}

    def check(backend: Backend, artefact: Artefact) -> str:
        nonlocal stored
        bounds = artefact.parity or graphs.get(artefact.precision)
        if bounds is None:
            return ""
        if stored is None:
            stored = _stored(bundle)
        for item in stored:
            if item.frame.shape[:2] != backend.frame_size:
                continue  # somebody exchanged the bundle's graph by hand
            found = backend.infer(item.frame[None], float(np.finfo(np.float32).max))
            scale = max(float(np.abs(item.anomaly_map).max()), _TINY)
            map_error = float(np.abs(found.anomaly_map[0] - item.anomaly_map).max()) / scale
            score_error = abs(float(found.score[0]) - item.score) / max(abs(item.score), _TINY)
            if not (map_error <= bounds.bound_map and score_error <= bounds.bound_score):  # NaN is wrong, too
                return (
                    f"on this machine its answers differ from the bundle's: {item.name}, map error {map_error:.1g} "
                    f"(bound {bounds.bound_map:.1g}), score error {score_error:.1g} (bound {bounds.bound_score:.1g})"
                )
        return ""

    return check


def _stored(bundle: Bundle) -> list[ReferenceFrame]:
    try:
        return read_reference(bundle)[0]
    except BundleCorruptError:  # a line goes on; `saae-export verify` reports it
        return []
