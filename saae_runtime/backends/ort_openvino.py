"""OpenVINO as a plug-in execution provider of ONNX Runtime: registration, device and hints."""

from __future__ import annotations

import importlib
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError
from .base import BackendOptions

__all__ = ["PROVIDER", "add_device", "missing"]

PROVIDER = "OpenVINOExecutionProvider"
_PACKAGE = "onnxruntime_ep_openvino"
_INSTALL = "pip install 'saae[openvino]'"
_lock = threading.Lock()


def missing(ort: Any) -> tuple[str, str]:
    """Why the plug-in cannot be used, and the cure; empty where it seems to be there."""
    if find_spec(_PACKAGE) is None:
        return "the OpenVINO plug-in onnxruntime-ep-openvino is not installed", _INSTALL
    if not hasattr(ort, "register_execution_provider_library") or not hasattr(ort, "get_ep_devices"):
        return f"ONNX Runtime {ort.__version__} takes no plug-in providers", "pip install --upgrade onnxruntime"
    return "", ""


def add_device(
    ort: Any, settings: Any, options: BackendOptions, cache: Path | None, precision: str
) -> str:
    """Puts an OpenVINO device into session options.

    Args:
        ort: the onnxruntime module.
        settings: its SessionOptions; changed.
        options: `device_type`, `hint`, `threads` are used.
        cache: folder for compiled models, or None.
        precision: of the graph; the arithmetic is chosen by what the device reports.

    Returns:
        The device in words.

    Raises:
        BackendUnavailableError: the plug-in does not load, or there is no such device.
    """
    _register(ort)
    wanted = options.device_type or "CPU"
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    kinds = {dict(device.ep_metadata).get("ov_device", "").split(".")[0]: device for device in reversed(devices)}
    if wanted not in kinds:
        raise BackendUnavailableError(
            f"OpenVINO has no {wanted} device here.",
            f"It reports: {', '.join(sorted(kinds)) or 'none'}.",
            "leave device_type out for the CPU; a GPU or NPU needs Intel's driver",
        )
    device = kinds[wanted]
    facts = dict(device.ep_metadata)
    arithmetic = _arithmetic(facts.get("OPTIMIZATION_CAPABILITIES", "").split())
    chosen = {"device_type": wanted}
    settings.add_provider_for_devices([device], chosen)
    name = facts.get("FULL_DEVICE_NAME", wanted)
    return f"OpenVINO {wanted} ({name}), {arithmetic} arithmetic, {options.hint}"


def _arithmetic(capabilities: list[str]) -> str:
    """bf16 has FP32's range, so nothing overflows; f16 where only that is fast."""
    for name in ("BF16", "FP16"):
        if name in capabilities:
            return {"BF16": "bf16", "FP16": "f16"}[name]
    return "f32"


def _register(ort: Any) -> None:
    with _lock:
        if any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
            return
        try:
            package = importlib.import_module(_PACKAGE)
            ort.register_execution_provider_library(PROVIDER, package.get_library_path())
        except Exception as error:  # a plug-in for another ONNX Runtime fails in many ways
            raise BackendUnavailableError(
                "The OpenVINO plug-in does not load.",
                f"{type(error).__name__}: {str(error).strip()[:300]} (ONNX Runtime {ort.__version__})",
                "pip install --upgrade onnxruntime onnxruntime-ep-openvino",
            ) from error
