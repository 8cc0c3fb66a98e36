"""Time from starting a process to its first result, stage by stage, each run in a fresh process.

    python benchmarks/startup.py BUNDLE [--backend auto] [--runs 10] [--out FILE]

Stages, cumulative from the moment the process is started:

  interpreter   Python itself is up;
  import        `import saae_runtime` is done;
  bundle        the bundle is open and the hashes of all its files are compared;
  library       the inference library is imported, ONNX Runtime where `auto` chooses (nothing, for a TensorRT backend);
  open          the Engine is open: model loaded and compiled by the backend, one frame run to warm up;
  first result  the first frame of the bundle's size has its result.

Each stage's own part is beside it: the median of the time since the stage before; and the processor time of all threads
until then, which other work on the machine hardly changes. Then: one further frame once warm, resident memory at the
end, and, where PyTorch is installed, what `import torch` alone takes in a fresh process. Files are in the page cache
after the first run, which is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.bundle import open_bundle
from saae_runtime.errors import SaaeError

STAGES = ("interpreter", "import", "bundle", "library", "open", "first result")

_CHILD = """
import time
marks, cpu = {}, {}
def mark(stage):
    marks[stage], cpu[stage] = time.time(), time.process_time()
mark("interpreter")
import json, sys
import saae_runtime
from saae_runtime import Engine, open_bundle
mark("import")
path, backend, height, width = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
bundle = open_bundle(path)
mark("bundle")
if backend == "openvino":
    from saae_runtime.backends.openvino.library import load_library
    load_library()
elif not backend.startswith("tensorrt"):
    import onnxruntime
mark("library")
engine = Engine(bundle, backend=backend)
mark("open")
import numpy as np
frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
engine(frame)
mark("first result")
start = time.perf_counter()
engine(frame)
warm = time.perf_counter() - start
description = engine.backend.description
engine.close()
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({"marks": marks, "cpu": cpu, "warm": warm, "backend": description, "torch": "torch" in sys.modules,
                  "peak_kib": int(status.get("VmHWM", "0").split()[0])}))
"""


def run_once(bundle: Path, backend: str, size: tuple[int, int]) -> dict[str, Any]:
    """Run a fresh process; return seconds since its start by stage under `stages`, and the child's report."""
    start = time.time()
    words = [sys.executable, "-c", _CHILD, str(bundle), backend, str(size[0]), str(size[1])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=common.ROOT, timeout=600)
    if done.returncode:
        raise SaaeError(
            "The timed process failed.", done.stderr.strip()[-2000:], f"saae-run {bundle} on one image shows the cause"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["stages"] = {name: found["marks"][name] - start for name in STAGES}
    return found


def parts(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds between consecutive stages, in every run."""
    before: tuple[str | None, ...] = (None, *STAGES)
    return {
        name: [run["stages"][name] - (run["stages"][last] if last else 0.0) for run in found]
        for last, name in zip(before, STAGES, strict=False)
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def import_alone(module: str) -> float:
    """Seconds of a fresh process that only imports a module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True, cwd=common.ROOT)
    return time.perf_counter() - start


def main(
    bundle: Annotated[Path, typer.Argument(help="a built bundle")],
    backend: Annotated[str, typer.Option(help="as in Engine(backend=...)")] = "auto",
    runs: Annotated[int, typer.Option(help="counted processes")] = 10,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Time the start of a process with a bundle; print and write the table."""
    common.print_machine()
    try:
        manifest = open_bundle(bundle, verify=False).manifest
        frame = manifest.frame
        found = [run_once(bundle.resolve(), backend, (frame.height, frame.width)) for _ in range(runs + 1)][1:]
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    timings = {name: common.Timing.of([f["stages"][name] for f in found]) for name in STAGES}
    timings["a warm frame"] = common.Timing.of([f["warm"] for f in found])
    timings["(import saae_runtime alone)"] = common.Timing.of([import_alone("saae_runtime") for _ in range(runs)])
    if find_spec("torch") is not None:
        import_alone("torch")
        timings["(import torch alone)"] = common.Timing.of([import_alone("torch") for _ in range(min(runs, 5))])
    own = {name: common.Timing.of(part).median_ms for name, part in parts(found).items()}
    work = {name: common.Timing.of([f["cpu"][name] for f in found]).median_ms for name in STAGES}
    rows = [
        {
            "stage": name,
            "part_ms": _rounded(own.get(name)),
            "cpu_ms": _rounded(work.get(name)),
            "timing": t.to_json(),
        }
        for name, t in timings.items()
    ]
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    peak = max(f["peak_kib"] for f in found) / 2**20
    data = common.result(
        "startup",
        rows,
        settings={"backend": backend, "runs": runs, "frame": [frame.height, frame.width]},
        inside="wall clock from starting a fresh process to each stage, files in the page cache; cumulative",
        backend=found[0]["backend"],
        bundle_mb=round(size, 1),
        peak_memory_gib=round(peak, 3),
    )
    common.print_table(
        f"Start of a process, {frame.height} x {frame.width} frame",
        ["stage", "its part, ms", "until then, ms", "p95 ms", "processor time, ms"],
        [(name, own.get(name), t.median_ms, t.p95_ms, work.get(name)) for name, t in timings.items()],
        [
            f"{found[0]['backend']}; bundle of {size:.0f} MB; peak memory {peak:.2f} GiB; "
            f"torch imported: {found[0]['torch']}.",
            f"Written to {common.write_result(data, out)}",
        ],
    )


if __name__ == "__main__":
    typer.run(main)
