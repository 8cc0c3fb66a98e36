"""OpenVINO as a plug-in execution provider of ONNX Runtime: registration, device and hints."""

from __future__ import annotations

import importlib
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import BackendUnavailableError
from ..base import BackendOptions
from .quiet import import_onnxruntime

__all__ = ["PROVIDER", "add_device", "bf16_missing", "calibrated_first", "has_bf16", "missing", "plugin_config"]

PROVIDER = "OpenVINOExecutionProvider"
_PACKAGE = "onnxruntime_ep_openvino"
_INSTALL = "pip install 'saae[openvino]'"
_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
# OpenVINO's hint overrides the types inside a graph, so each precision has its arithmetic. An FP16 graph was calibrated
# with sums in FP32, which f32 keeps; its residual forms hold in f16 as well (maps moved by 0.2 %), which is what a GPU
# and an NPU are made for. A CPU is slower in f16.
_CALIBRATED = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32", "int8-bf16": "bf16"}
_lock = threading.Lock()
# ONNX Runtime refuses to register a library twice, also one that offered no device or failed.
_registered: weakref.WeakKeyDictionary[Any, BackendUnavailableError | None] = weakref.WeakKeyDictionary()


def missing(ort: Any, device_type: str | None = None) -> tuple[str, str]:
    """Why the plug-in cannot be used on a device (default: the CPU), and the cure; empty where it seems to be there.

    A plug-in that is there and does not load is for `add_device` to report.
    """
    if find_spec(_PACKAGE) is None:
        return "the OpenVINO plug-in onnxruntime-ep-openvino is not installed", _INSTALL
    if not hasattr(ort, "register_execution_provider_library") or not hasattr(ort, "get_ep_devices"):
        return f"ONNX Runtime {ort.__version__} takes no plug-in providers", "pip install --upgrade onnxruntime"
    try:
        _register(ort)
    except BackendUnavailableError:
        return "", ""
    return _no_device(device_type or "CPU", _devices(ort))


def has_bf16(ort: Any, device_type: str | None = None) -> bool:
    """Whether an OpenVINO device (default: the CPU) reports that it computes in bf16; False where it does not load."""
    try:
        _register(ort)
    except BackendUnavailableError:
        return False
    _, facts = _devices(ort).get(device_type or "CPU", (None, {}))
    return "BF16" in facts.get("OPTIMIZATION_CAPABILITIES", "").split()


def bf16_missing() -> str:
    """Why nothing can be computed in bf16 on this machine's processor; empty if it can."""
    ort = import_onnxruntime()
    why, _ = missing(ort)
    if why:
        return why
    return "" if has_bf16(ort) else "OpenVINO reports no bf16 for this processor"


def calibrated_first(precisions: Sequence[str], arithmetic: str, device_type: str | None = None) -> tuple[str, ...]:
    """The precisions with those first whose thresholds were calibrated in an arithmetic, those of bf16 else last."""

    def rank(precision: str) -> int:
        calibrated = _calibrated(precision, device_type or "CPU")
        return 0 if calibrated == arithmetic else 2 if calibrated == "bf16" else 1

    return tuple(sorted(precisions, key=rank))


def add_device(ort: Any, settings: Any, options: BackendOptions, precision: str, cache: Path | None) -> str:
    """Puts an OpenVINO device into session options.

    Args:
        ort: the onnxruntime module.
        settings: its SessionOptions; changed.
        options: `device_type`, `arithmetic` (None: what the precision's thresholds are calibrated in), `hint` and
            `threads` are used.
        precision: one of `saae_runtime.manifest.PRECISIONS`.
        cache: folder for compiled models, or None.

    Returns:
        The device and its settings in words; where the arithmetic is not the calibrated one, they say so.

    Raises:
        BackendUnavailableError: the plug-in does not load, or there is no such device or arithmetic.
    """
    _register(ort)
    wanted = options.device_type or "CPU"
    found = _devices(ort)
    why, cure = _no_device(wanted, found)
    if why:
        raise BackendUnavailableError(f"OpenVINO has no {wanted} device here.", why, cure)
    device, facts = found[wanted]
    name = facts.get("FULL_DEVICE_NAME", wanted)
    able = [kind for kind in _CAPABILITY if _CAPABILITY[kind] in facts.get("OPTIMIZATION_CAPABILITIES", "").split()]
    calibrated = _calibrated(precision, wanted)
    arithmetic = _arithmetic(options.arithmetic, calibrated, able, name)
    config = plugin_config(wanted, arithmetic, options, cache)
    settings.add_provider_for_devices([device], {"load_config": json.dumps({wanted: config})})
    # Without this, what the plug-in does not take would quietly run elsewhere.
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    words = arithmetic if arithmetic == calibrated else f"{arithmetic} (thresholds were calibrated in {calibrated})"
    return f"OpenVINO {facts.get('version', '').partition('+')[0]} {wanted} ({name}), {words}, {options.hint}"


def plugin_config(device: str, arithmetic: str, options: BackendOptions, cache: Path | None) -> dict[str, str]:
    """OpenVINO's own properties for a device; an unknown one is an error there, so only those that it knows."""
    config = {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "PERFORMANCE_HINT": options.hint.upper(),
    }
    if device == "CPU" and options.threads is not None:
        config["INFERENCE_NUM_THREADS"] = str(options.threads)
    if cache is not None:
        config["CACHE_DIR"] = str(cache)
    return config


def _devices(ort: Any) -> dict[str, tuple[Any, Mapping[str, str]]]:
    """The first device of each type and what it reports."""
    found: dict[str, tuple[Any, Mapping[str, str]]] = {}
    for device in ort.get_ep_devices():
        if device.ep_name == PROVIDER:  # its meta device AUTO has a name of its own
            reported = dict(device.ep_metadata)
            found.setdefault(reported.get("ov_device", "").partition(".")[0], (device, reported))
    return found


def _no_device(wanted: str, found: Mapping[str, Any]) -> tuple[str, str]:
    if wanted in found:
        return "", ""
    reports = f"the plug-in offers {', '.join(sorted(found)) or 'no device'} on this machine"
    if wanted == "CPU":
        return f"{reports}; it has a CPU device on Intel processors alone", "backend='onnxruntime:cpu'"
    return reports, "leave device_type out for the CPU; a GPU or NPU needs Intel's driver"


def _calibrated(precision: str, device_type: str) -> str:
    return "f16" if precision == "fp16" and device_type != "CPU" else _CALIBRATED[precision]


def _arithmetic(asked: str | None, calibrated: str, able: list[str], name: str) -> str:
    """What was asked for, or what the thresholds were calibrated in: never what merely happens to be fast."""
    wanted = asked or calibrated
    if wanted in able or (wanted == "f32" and not able):  # every device that says nothing has f32
        return wanted
    others = " or ".join(f"arithmetic={kind!r}" for kind in able if kind != wanted)
    if asked is None:
        why = f"The thresholds were calibrated in {wanted}; in another arithmetic scores move."
        cure = f"another precision=, or {others} where that is good enough" if others else "another precision="
    else:
        why = f"OpenVINO reports for it: {', '.join(able) or 'nothing known'}."
        cure = f"leave arithmetic= out, or give {others}" if others else "leave arithmetic= out"
    raise BackendUnavailableError(f"{name} does not compute in {wanted}.", why, cure)


def _register(ort: Any) -> None:
    """Registers the plug-in once; every later call ends as the first did."""
    with _lock:
        if ort not in _registered:
            _registered[ort] = _load(ort)
        failure = _registered[ort]
    if failure is not None:
        raise failure


def _load(ort: Any) -> BackendUnavailableError | None:
    if any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        return None
    try:
        package = importlib.import_module(_PACKAGE)
        ort.register_execution_provider_library(PROVIDER, package.get_library_path())
    except Exception as error:  # a plug-in for another ONNX Runtime fails in many ways
        return BackendUnavailableError(
            "The OpenVINO plug-in does not load.",
            f"{type(error).__name__}: {str(error).strip()[:300]} (ONNX Runtime {ort.__version__})",
            "pip install --upgrade onnxruntime onnxruntime-ep-openvino",
        )
    return None
