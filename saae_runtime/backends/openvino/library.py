"""The package `openvino`, imported once per process, and its devices."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...errors import BackendUnavailableError
from ..machine import processor_flags

__all__ = ["INSTALL", "Device", "Library", "device_missing", "load_library"]

INSTALL = "pip install 'saae[openvino]'"
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert"}
_TELEMETRY = "openvino_telemetry"
_lock = threading.Lock()
_outcome: list[Library | BackendUnavailableError] = []  # of the first import: it is not tried again


@dataclass(frozen=True)
class Device:
    """A device as OpenVINO reports it.

    Attributes:
        kind: `CPU`, `GPU` or `NPU`.
        name: its full name.
        capabilities: such as `FP32`, `BF16` and `INT8`, without emulated ones.
    """

    kind: str
    name: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """The imported package and the core of this process, whose plug-ins stay loaded for later engines."""

    module: Any
    core: Any

    @property
    def version(self) -> str:
        """Such as 2026.4.1."""
        return str(self.module.__version__).partition("-")[0]

    def device(self, kind: str) -> Device:
        """The first device of a kind.

        Raises:
            BackendUnavailableError: there is none.
        """
        try:
            name = str(self.core.get_property(kind, "FULL_DEVICE_NAME")).strip()
            reported = self.core.get_property(kind, "OPTIMIZATION_CAPABILITIES")
        except Exception as error:  # OpenVINO raises RuntimeError for everything that is missing
            raise BackendUnavailableError(f"OpenVINO has no {kind} device here.", *self._no_device(kind)) from error
        emulated = {"BF16"} if kind == "CPU" and _emulates_bf16() else set()
        return Device(kind, name, tuple(item for item in reported if item not in emulated))

    def _no_device(self, kind: str) -> tuple[str, str]:
        try:
            found = sorted(self.core.available_devices)
        except Exception:
            found = []
        why = f"OpenVINO {self.version} offers {', '.join(found) or 'no device'} on this machine"
        if kind == "CPU":
            return why, "backend='onnxruntime:cpu'"
        return why, "leave device_type out for the CPU; a GPU or NPU needs Intel's driver"


def _emulates_bf16() -> bool:
    """Whether bf16 has no instructions on this processor.

    OpenVINO reports BF16 on every processor with AVX-512. Without BF16 instructions it is emulated, which took 26 times
    as long as FP32.
    """
    flags = processor_flags()
    return bool(flags) and not flags & _BF16_FLAGS


def device_missing(kind: str) -> tuple[str, str]:
    """Why OpenVINO cannot be used on a kind of device, and the cure; both empty if it can."""
    try:
        load_library().device(kind)
    except BackendUnavailableError as error:
        return error.why, error.cure
    return "", ""


def load_library() -> Library:
    """The package and its core; later calls return or raise the same as the first.

    Raises:
        BackendUnavailableError: it is not installed, or does not load.
    """
    if not _outcome and find_spec("openvino") is None:
        raise BackendUnavailableError("OpenVINO cannot be used here.", "the package openvino is not installed", INSTALL)
    with _lock:
        if not _outcome:
            _outcome.append(_load())
        found = _outcome[0]
    if isinstance(found, BackendUnavailableError):
        raise found
    return found


def _load() -> Library | BackendUnavailableError:
    try:
        with _without_telemetry():
            module = importlib.import_module("openvino")
        return Library(module, module.Core())
    except Exception as error:  # a wheel for another platform or another numpy fails in many ways
        why = f"openvino is installed and does not load: {type(error).__name__}: {str(error).strip()[:300]}"
        return BackendUnavailableError("OpenVINO cannot be used here.", why, "pip install --force-reinstall openvino")


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Within the block, OpenVINO finds no `openvino_telemetry` and uses its own empty replacement.

    Otherwise its import writes an identifier below the home folder and reports to a host. A program that has imported
    the telemetry package before keeps it.
    """
    if _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it is an ImportError now
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
