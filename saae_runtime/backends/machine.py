"""Describes what the speed of a backend depends on besides the bundle: processor, GPUs, libraries."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import sha256_bytes

__all__ = ["loaded_versions", "machine_facts", "processor_flags"]

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES")
_QUOTA = "/sys/fs/cgroup/cpu.max"
_DRIVER = "/proc/driver/nvidia"


def machine_facts() -> dict[str, Any]:
    """Processor, usable cores, GPUs and limits in the environment, as JSON values."""
    board = _read("/proc/device-tree/model").strip("\0\n ")
    flags = processor_flags()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": board or _cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "instructions": sha256_bytes(" ".join(sorted(flags)).encode())[:12] if flags else platform.machine(),
        "cores": cores,
        "quota": _read(_QUOTA).strip(),
        "gpus": _gpus(),
        "limits": {name: os.environ[name] for name in _LIMITS if name in os.environ},
    }


def processor_flags() -> frozenset[str]:
    """Instruction sets of the processor by Linux's names; empty if unknown."""
    facts = _cpuinfo()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def loaded_versions(modules: Iterable[str]) -> dict[str, str]:
    """`__version__` of imported modules, because a frozen program has no package metadata."""
    loaded = {name: sys.modules.get(name) for name in modules}
    return {name: str(getattr(module, "__version__", "?")) for name, module in sorted(loaded.items()) if module}


def _cpuinfo() -> dict[str, str]:
    """Fields of the first core in /proc/cpuinfo."""
    lines = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
    return {name.strip(): value.strip() for name, _, value in reversed(lines)}


def _gpus() -> list[str]:
    """NVIDIA's driver and GPUs, if its kernel module shows them."""
    driver = _read(f"{_DRIVER}/version").partition("\n")[0]
    if not driver:
        return []
    models = []
    for file in sorted(Path(_DRIVER, "gpus").glob("*/information")):
        named = [line.partition(":")[2].strip() for line in _read(file).splitlines() if line.startswith("Model")]
        models += named
    return [driver, *models]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
