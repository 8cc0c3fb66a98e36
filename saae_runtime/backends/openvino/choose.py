"""Finds the graph of a bundle that OpenVINO can run here, and opens it."""

from __future__ import annotations

from ...bundle import Bundle
from ...errors import BackendUnavailableError
from ...manifest import IN_BF16
from ..base import BackendOptions, Candidate
from ..pick import no_graph, pick_graph
from . import library
from .arithmetic import calibrated_first, has_bf16
from .backend import NAME, OpenVinoBackend

__all__ = ["bf16_missing", "candidates", "open_backend"]

# An INT8 graph is only in a bundle by request and after its quality gate, so it comes first.
_PREFERENCE: tuple[str, ...] = ("int8-bf16", "bf16", "int8", "fp32", "fp16")


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """OpenVINO's backend for this bundle; see `saae_runtime.backends.candidates`."""
    return [_candidate(bundle, precision)]


def open_backend(
    bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions
) -> OpenVinoBackend:
    """Open `openvino`.

    Raises:
        BackendUnavailableError: OpenVINO, or the requested device or arithmetic, is missing, or the bundle has no
            file for it.
        BackendError: the file cannot be loaded.
    """
    candidate = _candidate(bundle, precision, options.device_type, options.arithmetic)
    if candidate.why_not is not None or candidate.artefact is None:
        what = f"The backend {NAME} cannot be used here."
        raise BackendUnavailableError(what, candidate.why_not or "", candidate.cure)
    return OpenVinoBackend(bundle, candidate.artefact, options)


def bf16_missing() -> str:
    """Why this machine's processor cannot compute in bf16; empty if it can."""
    why, _ = library.device_missing("CPU")
    if why:
        return why
    device = library.load_library().device("CPU")
    return "" if has_bf16(device) else f"this processor has no bf16 instructions ({device.name})"


def _candidate(
    bundle: Bundle, precision: str | None, device_type: str | None = None, arithmetic: str | None = None
) -> Candidate:
    kind = device_type or "CPU"
    why, cure = library.device_missing(kind)
    able, note = _PREFERENCE, ""
    asks = not why and set(IN_BF16) & set(bundle.manifest.precisions())
    if asks and not has_bf16(library.load_library().device(kind)):
        able = tuple(item for item in able if item not in IN_BF16)
        note = "no bf16: the device has none"
    if arithmetic is not None:
        able = calibrated_first(able, arithmetic, kind)
    artefact = pick_graph(bundle, able, precision)
    if not why and artefact is None:
        why, cure = no_graph(bundle, precision)
    return Candidate(NAME, artefact, why or None, note, cure)
