"""The arithmetic in which OpenVINO computes a precision: by default the one that its thresholds were calibrated in."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import BackendUnavailableError
from .library import Device

__all__ = ["arithmetic_of", "calibrated", "calibrated_first", "has_bf16"]

_CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
# OpenVINO's hint overrides the types inside a graph, and without one it takes what is fast, such as bf16 on a processor
# with AMX. So each precision has its arithmetic. An FP16 graph was calibrated with sums in FP32, which f32 keeps; its
# residual forms hold in f16 as well (maps moved by 0.2 %), which is what a GPU and an NPU are made for. A CPU is slower
# in f16.
_CALIBRATED = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32", "int8-bf16": "bf16"}


def calibrated(precision: str, kind: str) -> str:
    """The arithmetic that the thresholds of a precision were calibrated in, for a kind of device."""
    return "f16" if precision == "fp16" and kind != "CPU" else _CALIBRATED[precision]


def calibrated_first(precisions: Sequence[str], arithmetic: str, kind: str) -> tuple[str, ...]:
    """The precisions, first those calibrated in an arithmetic; those of bf16 last otherwise."""

    def rank(precision: str) -> int:
        own = calibrated(precision, kind)
        return 0 if own == arithmetic else 2 if own == "bf16" else 1

    return tuple(sorted(precisions, key=rank))


def has_bf16(device: Device) -> bool:
    """Whether a device reports that it computes in bf16."""
    return _CAPABILITY["bf16"] in device.capabilities


def arithmetic_of(device: Device, precision: str, asked: str | None) -> str:
    """The requested arithmetic, or the one that the thresholds were calibrated in.

    Args:
        device: computes.
        precision: one of `saae_runtime.manifest.PRECISIONS`.
        asked: `f32`, `bf16`, `f16` or None.

    Raises:
        BackendUnavailableError: the device does not have it.
    """
    able = [kind for kind in _CAPABILITY if _CAPABILITY[kind] in device.capabilities]
    wanted = asked or calibrated(precision, device.kind)
    if wanted in able or (wanted == "f32" and not able):  # a device that reports nothing has f32
        return wanted
    others = " or ".join(f"arithmetic={kind!r}" for kind in able if kind != wanted)
    if asked is None:
        why = f"The thresholds were calibrated in {wanted}; in another arithmetic scores move."
        cure = f"another precision=, or {others} where that is good enough" if others else "another precision="
    else:
        why = f"OpenVINO reports for it: {', '.join(able) or 'nothing known'}."
        cure = f"leave arithmetic= out, or give {others}" if others else "leave arithmetic= out"
    raise BackendUnavailableError(f"{device.name} does not compute in {wanted}.", why, cure)
