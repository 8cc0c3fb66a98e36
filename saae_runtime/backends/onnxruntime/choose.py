"""Finds ONNX Runtime's backends for a bundle and their graphs, and opens one."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from ...bundle import Bundle
from ...errors import BackendUnavailableError
from ..base import BackendOptions, Candidate
from ..pick import no_graph, pick_graph
from .backend import INSTALL, PROVIDERS, OrtBackend
from .gpu import load_tensorrt
from .quiet import import_onnxruntime

__all__ = ["candidates", "open_backend"]

# An INT8 graph is only in a bundle by request and after its quality gate, so it comes first.
# FP16 on a CPU is emulated: last.
_PREFERENCE = {
    "onnxruntime:cpu": ("int8", "fp32", "fp16"),
    "onnxruntime:cuda": ("fp16", "fp32"),
    "onnxruntime:tensorrt": ("fp16", "fp32"),
}


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """ONNX Runtime's backends for this bundle; see `saae_runtime.backends.candidates`."""
    return [_candidate(bundle, name, precision) for name in PROVIDERS]


def open_backend(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> OrtBackend:
    """Open `onnxruntime:cpu`, `:cuda` or `:tensorrt`.

    Raises:
        BackendUnavailableError: ONNX Runtime or its provider is missing, or the bundle has no file for it.
        DeviceError: the device fails.
        BackendError: the file cannot be loaded.
    """
    candidate = _candidate(bundle, name, precision)
    if candidate.why_not is not None or candidate.artefact is None:
        raise BackendUnavailableError(
            f"The backend {name} cannot be used here.", candidate.why_not or "", candidate.cure
        )
    return OrtBackend(bundle, name, candidate.artefact, device, options)


def _candidate(bundle: Bundle, name: str, precision: str | None) -> Candidate:
    why, cure = _missing(name)
    artefact = pick_graph(bundle, _PREFERENCE[name], precision)
    if not why and artefact is None:
        why, cure = no_graph(bundle, precision)
    return Candidate(name, artefact, why or None, cure=cure)


def _missing(name: str) -> tuple[str, str]:
    """Why a provider is missing, and what to install; empty if it seems to be installed."""
    if find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed", INSTALL[name]
    try:
        ort = import_onnxruntime()
    except Exception as error:  # a wheel for another platform fails in various ways
        why = f"ONNX Runtime is installed but cannot be imported ({error})"
        return why, "pip install --force-reinstall onnxruntime"
    if PROVIDERS[name] not in ort.get_available_providers():
        why = f"this ONNX Runtime {ort.__version__} was built without {PROVIDERS[name]}"
        # Both wheels install the same package; the one that came last would win.
        return why, f"pip uninstall onnxruntime; {INSTALL[name]}"
    if name != "onnxruntime:cpu" and not _has_nvidia_driver():
        return "there is no NVIDIA driver (libcuda.so.1)", "install the driver; saae-export doctor shows what is there"
    if name == "onnxruntime:tensorrt" and (why := load_tensorrt(Path(ort.__file__).parent)):
        return why, INSTALL[name]
    return "", ""


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
