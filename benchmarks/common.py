"""What every benchmark shares: the machine's description, timing, peak memory, result files and tables.

A result file says everything needed to read its numbers later: machine, versions, command, settings,
and what is inside each timing. Timings are medians over many runs after a warm-up; things that are
compared are timed alternately in one process, so that a busy machine slows both.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from saae_runtime.files import write_json
from saae_train.experiments.timing import PeakMemory as PeakMemory
from saae_train.experiments.timing import Timing as Timing

__all__ = [
    "RESULTS",
    "ROOT",
    "command",
    "machine",
    "print_machine",
    "print_table",
    "resident_mib",
    "result",
    "usable_cores",
    "use_threads",
    "versions",
    "write_result",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Instruction sets that decide how fast inference is; x86 names as in /proc/cpuinfo, then ARM's.
_ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_DISTRIBUTIONS = (
    "saae", "numpy", "scipy", "scikit-learn", "torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-ep-openvino", "openvino", "tensorrt", "tensorrt-rtx", "tensorrt-lean", "cuda-python", "faiss-cpu",
)  # fmt: skip


# ---- the machine ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU model, usable cores, instruction sets, memory in GiB, GPUs, system. No host or user name."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": _board() or info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "isa": [name for name in _ISA if name in flags],
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of everything that can affect the results."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def _board() -> str:
    """The board's name from the device tree, if there is one (Jetson, Raspberry Pi)."""
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _gpus() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = "name,driver_version,memory.total,compute_cap"
    try:
        out = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in out.splitlines() if line.strip()]
    return [dict(zip(fields.split(","), row, strict=False)) for row in rows]


# ---- timing -----------------------------------------------------------------------------------------


def use_threads(count: int) -> None:
    """Hold this process, its libraries and its children to `count` cores; call before importing torch.

    Libraries that are loaded already keep their pools but share the fewer cores; torch's threads are set, too.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def resident_mib() -> float:
    """Resident memory of this process now, in MiB; 0 if the system does not report it."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


# ---- results ----------------------------------------------------------------------------------------


def command() -> str:
    """The command line; paths in the checkout are shown relative to it, others by their name alone."""
    shown = []
    for word in sys.argv:
        if Path(word).is_absolute() or word.startswith(".."):
            relative = os.path.relpath(word, ROOT)
            word = relative if not relative.startswith("..") else Path(word).name
        shown.append(word)
    return "python " + shlex.join(shown)


def result(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A result: benchmark, machine, command, time, rows, and other fields (`inside`, `settings`)."""
    return {
        "benchmark": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        **more,
        "rows": [dict(row) for row in rows],
    }


def write_result(data: Mapping[str, Any], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a result as JSON (atomically), by default to benchmarks/results/<benchmark>.json; returns the path."""
    path = RESULTS / f"{data['benchmark']}.json" if out is None else Path(out)
    write_json(path, data)
    return path


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()
) -> None:
    """Print a table: the first column left, the others right; floats with up to four digits, None as "-"."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, style="dim", soft_wrap=True)


def print_machine() -> None:
    """One line about the machine and the versions."""
    from rich.console import Console

    m = machine()
    gpus = ", ".join(g["name"] for g in m["gpus"]) or "no GPU"
    isa = " ".join(m["isa"])
    Console().print(
        f"{m['cpu']}, {m['cores']} cores ({isa}), {m['memory_gib']} GiB, {gpus}; Python {m['python']}",
        style="dim",
        soft_wrap=True,
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
