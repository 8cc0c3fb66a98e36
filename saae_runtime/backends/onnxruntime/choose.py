"""Which of ONNX Runtime's backends can run a bundle here, with which of its graphs; and opening one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec

from ...bundle import Bundle
from ...errors import BackendUnavailableError
from ...manifest import IN_BF16, Artefact
from ..base import BackendOptions, Candidate
from . import openvino as ort_openvino
from .backend import INSTALL, PROVIDERS, OrtBackend
from .quiet import import_onnxruntime

__all__ = ["candidates", "open_backend"]

# An INT8 graph is only in a bundle where somebody asked for it and it passed its quality gate, so it comes first.
# FP16 on a CPU is emulated: last. Only OpenVINO computes in bf16, and only where the device has it.
_PREFERENCE = {
    "onnxruntime:cpu": ("int8", "fp32", "fp16"),
    "onnxruntime:openvino": ("int8-bf16", "bf16", "int8", "fp32", "fp16"),
    "onnxruntime:cuda": ("fp16", "fp32"),
    "onnxruntime:tensorrt": ("fp16", "fp32"),
}
_BUILT = {
    "fp32": "--precision fp32",
    "fp16": "--precision fp32,fp16",
    "bf16": "--precision fp32,bf16",
    "int8": "--int8",
    "int8-bf16": "--int8",
}


def candidates(bundle: Bundle, device: int = 0, precision: str | None = None) -> list[Candidate]:
    """What ONNX Runtime could run of this bundle here; see `saae_runtime.backends.candidates`."""
    return [_candidate(bundle, name, precision) for name in PROVIDERS]


def open_backend(bundle: Bundle, name: str, device: int, precision: str | None, options: BackendOptions) -> OrtBackend:
    """Opens `onnxruntime:cpu`, `:cuda`, `:tensorrt` or `:openvino`.

    Raises:
        BackendUnavailableError: ONNX Runtime or its provider is not there, or the bundle has no file for it.
        DeviceError: the device is there and fails.
        BackendError: the file cannot be loaded.
    """
    candidate = _candidate(bundle, name, precision, options.device_type, options.arithmetic)
    if candidate.why_not is not None or candidate.artefact is None:
        raise BackendUnavailableError(
            f"The backend {name} cannot be used here.", candidate.why_not or "", candidate.cure
        )
    return OrtBackend(bundle, name, candidate.artefact, device, options)


def _candidate(
    bundle: Bundle, name: str, precision: str | None, device_type: str | None = None, arithmetic: str | None = None
) -> Candidate:
    why, cure = _missing(name, device_type)
    able, note = _PREFERENCE[name], ""
    asks = name == "onnxruntime:openvino" and not why and set(IN_BF16) & set(bundle.manifest.precisions())
    if asks and not ort_openvino.has_bf16(import_onnxruntime(), device_type):
        able = tuple(item for item in able if item not in IN_BF16)
        note = "no bf16: the device has none"
    if name == "onnxruntime:openvino" and arithmetic is not None:
        able = ort_openvino.calibrated_first(able, arithmetic, device_type)
    artefact = _pick(bundle, able, precision)
    if not why and artefact is None:
        why, cure = _no_file(bundle, name, precision)
    return Candidate(name, artefact, why or None, note, cure)


def _pick(bundle: Bundle, able: Sequence[str], precision: str | None) -> Artefact | None:
    for wanted in able if precision is None else [item for item in able if item == precision]:
        for artefact in bundle.artefacts(kind="onnx", precision=wanted):
            if precision is not None or artefact.parity is None or artefact.parity.passed:
                return artefact
    return None


def _no_file(bundle: Bundle, name: str, precision: str | None) -> tuple[str, str]:
    held = [artefact.precision for artefact in bundle.artefacts(kind="onnx")]
    if precision in IN_BF16 and precision in held:
        return (
            f"only OpenVINO computes in {precision}, on a device that has bf16",
            "leave precision= out, or backend='onnxruntime:openvino' on a processor with bf16",
        )
    if precision is not None:
        why = f"the bundle has no {precision} ONNX file (it has: {', '.join(held) or 'none'})"
        return why, f"leave precision= out, or build it: saae-export build {_BUILT[precision]}"
    why = f"the bundle has no ONNX file for it that passed its parity check (it has: {', '.join(held) or 'none'})"
    return why, f"rebuild the bundle, or name the precision: precision={(held or ['fp32'])[0]!r}"


def _missing(name: str, device_type: str | None = None) -> tuple[str, str]:
    """Why a provider is not there, and what to install; empty where it seems to be there."""
    if find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed", INSTALL[name]
    try:
        ort = import_onnxruntime()
    except Exception as error:  # a wheel for another platform fails in many ways
        why = f"ONNX Runtime is installed but cannot be imported ({error})"
        return why, "pip install --force-reinstall onnxruntime"
    if name == "onnxruntime:openvino":
        return ort_openvino.missing(ort, device_type)
    if PROVIDERS[name] not in ort.get_available_providers():
        why = f"this ONNX Runtime {ort.__version__} was built without {PROVIDERS[name]}"
        # Both wheels install the same package; the one that came last would win.
        return why, f"pip uninstall onnxruntime; {INSTALL[name]}"
    if name != "onnxruntime:cpu" and not _has_nvidia_driver():
        return "there is no NVIDIA driver (libcuda.so.1)", "install the driver; saae-export doctor shows what is there"
    return "", ""


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
