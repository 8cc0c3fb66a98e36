"""What every benchmark shares: the machine's description, timing, peak memory, result files and tables.

A result file says everything needed to read its numbers later: machine, versions, command, settings,
and what is inside each timing. Timings are medians over many runs after a warm-up; things that are
compared are timed alternately in one process, so that a busy machine slows both.
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from saae_runtime.files import write_json

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
    """Installed versions of everything that can shape a number here."""
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
    """The board's name where a device tree gives one (Jetson, Raspberry Pi)."""
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


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over `runs` timed calls."""

    runs: int
    median_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ms = np.asarray(seconds, dtype=np.float64) * 1000.0
        if ms.size == 0:
            raise ValueError("no timed run")
        median, p95, p99 = np.percentile(ms, [50, 95, 99])
        return cls(ms.size, float(median), float(p95), float(p99), float(ms.min()), float(ms.mean()))

    @property
    def per_second(self) -> float:
        return 1000.0 / self.median_ms if self.median_ms > 0 else float("inf")

    def to_json(self) -> dict[str, float]:
        return {k: (v if isinstance(v, int) else round(v, 4)) for k, v in asdict(self).items()}


def measure(call: Callable[[], object], *, runs: int = 50, warmup: int = 5, max_seconds: float = 60.0) -> Timing:
    """Time one call; see `measure_together`."""
    return measure_together({"": call}, runs=runs, warmup=warmup, max_seconds=max_seconds)[""]


def measure_together(
    calls: Mapping[str, Callable[[], object]], *, runs: int = 50, warmup: int = 5, max_seconds: float = 60.0
) -> dict[str, Timing]:
    """Time several calls alternately: each round runs every call once, so load on the machine hits all alike.

    The first `warmup` rounds are not counted. Rounds end after `runs`, or after `max_seconds` with at least
    three counted. The garbage collector is off meanwhile. A call that starts work on a device must wait for it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            for call in calls.values():
                call()
        start = time.perf_counter()
        for done in range(max(runs, 1)):
            if done >= 3 and time.perf_counter() - start > max_seconds:
                break
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - before)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


def use_threads(count: int) -> None:
    """Hold this process, its libraries and its children to `count` cores; call before importing torch.

    Libraries that are loaded already keep their pools but share the fewer cores; torch is told as well.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def resident_mib() -> float:
    """Resident memory of this process now, in MiB; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


class PeakMemory:
    """Largest resident memory of this process since the block began, in GiB (`.gib`, after the block).

    On Linux the kernel's high-water mark is reset at the start; where that is refused, `since_start` is True and
    the number covers the process's whole life.
    """

    def __init__(self) -> None:
        self.gib = 0.0
        self.since_start = False

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.since_start = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.gib = _high_water_kib() / 2**20


def _high_water_kib() -> float:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else float(peak)


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the seconds since the block began (and, after it, its length)."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())


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
    """A whole result: what was run where and when, its rows, and whatever else belongs to it (`inside`, `settings`)."""
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
    """One line that says where the numbers come from."""
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
