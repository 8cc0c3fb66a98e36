"""In which numbers a fit computes: bfloat16, or float32 with its products in TF32 or in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["arithmetic", "matmul_precision", "reached"]


def arithmetic(precision: str, device: torch.device) -> str:
    """What `FitConfig.precision` comes to on a device: `bf16`, `tf32` or `fp32`.

    `auto` is bf16 where the processor has instructions for it, not where it is emulated, else FP32. TF32 is a matter of
    NVIDIA's GPUs from Ampere on; elsewhere `tf32` is FP32.
    """
    if precision == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    if precision == "tf32":
        return "tf32" if device.type == "cuda" and _from_ampere_on(device) else "fp32"
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return _from_ampere_on(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _from_ampere_on(device: torch.device) -> bool:
    """Matrix units for bf16 and TF32 came together."""
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def matmul_precision(kind: str, device: torch.device) -> Iterator[None]:
    """Within the block, float32 products on a CUDA device are in TF32 where `kind` is `tf32`, else in full.

    By default PyTorch computes matrix products in full and convolutions in TF32. What was set before is put back. The
    switches are the process's, so the block is to hold this device's work and no caller's.

    Args:
        kind: from `arithmetic`.
        device: elsewhere than on CUDA nothing is touched.
    """
    if device.type != "cuda":
        yield
        return
    switches = _switches()
    before = [getattr(place, name) for place, name, _, _ in switches]
    try:
        for place, name, tf32, full in switches:
            setattr(place, name, tf32 if kind == "tf32" else full)
        yield
    finally:
        for (place, name, _, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def reached(device: torch.device, convolutions: bool) -> str:
    """What float32 products are computed in on a device, as things are set now: `fp32`, or what is in TF32.

    Args:
        device: where.
        convolutions: whether there are convolutions besides matrix products.
    """
    if device.type != "cuda" or not _from_ampere_on(device):
        return "fp32"
    matrices, convolved = (getattr(place, name) == tf32 for place, name, tf32, _ in _switches())
    if not convolutions or matrices == convolved:
        return "tf32" if matrices else "fp32"
    return "tf32, convolutions fp32" if matrices else "fp32, convolutions tf32"


def _switches() -> tuple[tuple[Any, str, Any, Any], ...]:
    """Object, attribute, its value for TF32 and for FP32; of matrix products and of convolutions."""
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(convolutions, "conv"):  # from PyTorch 2.9 on, which warns of the older names
        name = "fp32_precision"
        return (matrices, name, "tf32", "ieee"), (convolutions.conv, name, "tf32", "ieee")
    return (matrices, "allow_tf32", True, False), (convolutions, "allow_tf32", True, False)
