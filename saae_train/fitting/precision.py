"""Arithmetic of a fit: bfloat16, or float32 with matrix products in TF32 or in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["arithmetic", "matmul_precision", "reached"]


def arithmetic(precision: str, device: torch.device) -> str:
    """Resolve `FitConfig.precision` for a device: `bf16`, `tf32` or `fp32`.

    `auto` is bf16 if the processor has instructions for it, else FP32. Only NVIDIA GPUs from Ampere on have TF32;
    elsewhere `tf32` is FP32.
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
    """Whether the GPU has matrix units for bf16 and TF32, which came together."""
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def matmul_precision(kind: str, device: torch.device) -> Iterator[None]:
    """Within the block, float32 products on a CUDA device are computed in TF32 if `kind` is `tf32`, else in full.

    By default PyTorch computes matrix products in full and convolutions in TF32. The previous settings are restored.
    The switches are global to the process, so keep callers' code out of the block.

    Args:
        kind: from `arithmetic`.
        device: unless it is a CUDA device, nothing changes.
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
    """Arithmetic of float32 products on a device with the current settings: `fp32`, or which products are in TF32.

    Args:
        device: torch device.
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
