"""All measurements that need an NVIDIA GPU, part by part; ends with a message if there is no GPU.

    python benchmarks/gpu.py BUNDLE [--parts engine,parity,fps,split,soak,threads,fit] [--backend auto] [--batch 1,8,32]
                             [--frames 20000] [--data IMAGES] [--checkpoint DIR] [--seconds 2] [--kinds compute,device]
                             [--out FOLDER]

  engine    compiles the bundle's FP16 graph with each TensorRT that is installed, and records what each reports about
            this GPU; the engine stays in the bundle
  parity    every artefact that runs here against its reference, on --data or on the bundle's own frames
  fps       benchmarks/fps.py on this GPU at each batch size for PyTorch, PyTorch in a CUDA graph and every backend
            that runs on the GPU, and from its rows what share of the FP16 matrix rate the graph reaches (a plain large
            matmul in the same run is the reference)
  split     where a batch's time goes by CUDA events, one batch at a time (TensorRT only): copy in, compute, copy out
  soak      many frames through one engine: memory of the host and of the GPU, read twenty times
  threads   four threads on one engine: every result is compared with that of a single thread, bit for bit
  fit       benchmarks/fit.py on this GPU for the presets fast and paper with random weights and drawn images, without
            the bundle (gpu-fit-fast.json, gpu-fit-paper.json; gpu-fit.json has the main figures of both)

Each part writes gpu-PART.json into the folder (default benchmarks/results). The exit code is 1 if a part found a fault:
parity beyond its bound, memory that grows, answers that differ between threads, a fit that was not captured as a CUDA
graph, or one whose loss differs from the plain loop's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, memory
from benchmarks.gpu_split import PARTS as SPLIT
from benchmarks.gpu_split import TimedCuda, split
from saae_runtime.backends import AUTO_ORDER, ON_CPU, candidates
from saae_runtime.backends.base import BackendOptions
from saae_runtime.backends.cuda.api import CudaApi, GpuInfo
from saae_runtime.bundle import open_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError, ConfigError, ParityError, SaaeError

PARTS = ("engine", "parity", "fps", "split", "soak", "threads", "fit")
HOST_GROWTH = 0.02
"""Flat: resident memory after the first reading grows by no more than this share."""
DEVICE_GROWTH = 8.0
"""Flat: memory taken on the GPU grows by no more than this many MiB."""
AIM = 0.6
"""Share of the matrix rate that the graph should reach at batch 32."""
KINDS = "compute,device"
"""Of fps.py: the others resize camera frames on the CPU, for minutes at a batch of 32."""
THREADS = 4
FITS = {"fast": ("--images", "64"), "paper": ("--images", "204", "--latent", "300")}
"""204 of 240 images remain for fitting; V on real images is about 300."""
LOSS = 0.05
"""The losses of the fits that are compared differ by no more than this share."""

Answer = tuple[float, bytes, bytes]


# -- what needs no GPU


def chosen_parts(text: str | None) -> tuple[str, ...]:
    """The parts in the order in which they are run.

    Raises:
        ConfigError: an unknown one.
    """
    wanted = PARTS if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise ConfigError(f"There is no part {', '.join(unknown) or '(none named)'}.", "", f"--parts {','.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from `1,8,32`.

    Raises:
        ConfigError: no whole numbers from 1 up.
    """
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if not sizes or min(sizes) < 1 or len(sizes) != len(text.split(",")):
        raise ConfigError(f"--batch {text} is not possible.", "", "--batch 1,8,32")
    return sizes


def flat(readings: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Whether memory stayed flat over readings {resident_mib, device_mib}, and by how much it grew after the first."""
    first, later = readings[0], readings[1:]
    host = max(reading["resident_mib"] for reading in later) / first["resident_mib"] - 1
    device = max(reading["device_mib"] for reading in later) - first["device_mib"]
    return {
        "host_growth": round(host, 5),
        "device_growth_mib": round(device, 3),
        "flat": host <= HOST_GROWTH and device <= DEVICE_GROWTH,
    }


def matrix_share(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of the FP16 matrix rate that each FP16 row of an fps result reaches; empty without a rate."""
    rate, work = data.get("matmul_fp16_tflops"), data["model"]["gflop_per_frame"]
    if not rate:
        return []
    rows = []
    for row in data["rows"]:
        if row["kind"] in ("device", "compute") and row["precision"] == "fp16":
            reached = row["fps"] * work / 1000
            rows.append(
                {
                    **{name: row[name] for name in ("backend", "precision", "kind", "batch", "fps")},
                    "tflops": round(reached, 2),
                    "share": round(reached / rate, 4),
                }
            )
    return rows


def fit_rows(preset: str, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main figures of a result of benchmarks/fit.py."""
    names = ("way", "precision", "images_per_second", "ratio", "once_s", "whole_fit_s", "loss", "peak_device_gib")
    return [
        {"preset": preset, **{name: row[name] for name in names}, "step_ms": row["timing"]["median_ms"]}
        for row in data["rows"]
    ]


def fit_is_well(data: Mapping[str, Any]) -> bool:
    """Whether a fit was captured and reached the loss of the plain loop."""
    loss = {row["way"]: row["loss"] for row in data["rows"]}
    return bool(data["model"]["captured"] and abs(loss["saae"] / loss["plain"] - 1) <= LOSS)


def in_threads(
    score: Callable[[Any], Answer], frames: Sequence[Any], expected: Sequence[Answer], rounds: int
) -> dict[str, int]:
    """Score all frames `rounds` times on four threads, each with another start; count unexpected results.

    Raises:
        The exception that a thread raised.
    """
    wrong, errors, lock = [0], [], threading.Lock()

    def work(offset: int) -> None:
        try:
            for turn in range(rounds * len(frames)):
                index = (turn + offset) % len(frames)
                if score(frames[index]) != expected[index]:
                    with lock:
                        wrong[0] += 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number * 7,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return {"threads": THREADS, "calls": THREADS * rounds * len(frames), "different": wrong[0]}


def require_gpu() -> GpuInfo:
    """The first GPU.

    Raises:
        SaaeError: none is usable, with the reason.
    """
    api = CudaApi()
    api.check_driver()
    return api.device(0)


# -- the parts; each returns (rows, what else belongs into the file, whether all is well)

Found = tuple[list[dict[str, Any]], dict[str, Any], bool]


def _engine(bundle: Path, largest: int) -> Found:
    from saae_export.tensorrt.compile import EngineOptions, build_engine
    from saae_export.tensorrt.gate import gate

    rows: list[dict[str, Any]] = []
    well = True
    for library in ("tensorrt", "tensorrt-rtx"):
        options = EngineOptions(1, 1 if largest == 1 else largest // 2, largest)
        try:
            built = build_engine(bundle, library=library, options=options)
        except SaaeError as error:
            rows.append({"library": library, "said": f"{error.what} {error.why}".strip()})
            continue
        row = {"library": library, "file": built.artefact.file, "seconds": round(built.compiled.seconds, 1)}
        try:
            rows.append({**row, "parity": getattr(gate(built), "passed", None)})
        except (ParityError, BackendError) as error:  # compiled, and its answers are wrong
            rows.append({**row, "parity": False, "said": f"{error.what} {error.why}".strip()})
            well = False
    return rows, {"inside": "compiling model.fp16.onnx on this GPU, and the bundle's frames compared"}, well


def _parity(bundle: Path, data: Path | None, checkpoint: Path | None) -> Found:
    from saae_export.parity.verify import verify

    found = verify(bundle, data=data, checkpoint=checkpoint)
    rows = [
        {
            "artefact": report.artefact,
            "precision": report.precision,
            "against": report.against,
            "images": len(report.images),
            "map_error": report.map_error,
            "score_error": report.score_error,
            "flips": report.flips,
            "passed": report.passed,
        }
        for report in found.reports
    ]
    not_run = [{"name": item.name, "why": item.why} for item in found.skipped]
    return (
        rows,
        {"not_run": not_run, "inside": "largest error over all images; flips at T"},
        all(r["passed"] for r in rows),
    )


def _fps(bundle: Path, batches: Sequence[int], seconds: float, kinds: str, checkpoint: Path | None, out: Path) -> Found:
    usable = [item.name for item in candidates(open_bundle(bundle)) if item.why_not is None]
    names = ["pytorch", "pytorch:cudagraph", *(name for name in usable if name in AUTO_ORDER and name not in ON_CPU)]
    command = [sys.executable, str(Path(__file__).with_name("fps.py")), str(bundle), "--device", "cuda"]
    command += ["--batch", ",".join(map(str, batches)), "--seconds", str(seconds), "--kinds", kinds]
    command += ["--backends", ",".join(names), "--out", str(out / "gpu-fps.json")]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint)]
    _run(command)
    data = json.loads((out / "gpu-fps.json").read_text(encoding="utf-8"))
    inside = "rate of FP16 rows of gpu-fps.json: frames a second times the graph's matrix work"
    return matrix_share(data), {"matmul_fp16_tflops": data["matmul_fp16_tflops"], "aim": AIM, "inside": inside}, True


def _split(bundle: Path, backend: str, batches: Sequence[int], runs: int) -> Found:
    from saae_runtime.backends.tensorrt import choose as trt

    opened = open_bundle(bundle)
    usable = [item for item in candidates(opened) if item.name.startswith("tensorrt")]
    usable = [item for item in usable if backend in ("auto", item.name)]
    names = [item.name for item in usable if item.why_not is None]
    if not names:
        reasons = "; ".join(f"{item.name}: {item.why_not}" for item in usable)
        return [], {"not_here": reasons or f"{backend} is no TensorRT backend"}, True
    cuda = TimedCuda()
    running = trt.open_backend(opened, names[0], options=BackendOptions(slots=1), api=cuda)
    try:
        rows = split(running, cuda, batches, runs)
    finally:
        running.close()
    return rows, {"backend": running.description, "inside": "by CUDA events on the GPU, one batch at a time"}, True


def _soak(bundle: Path, backend: str, frames: int) -> Found:
    api = CudaApi()

    def device() -> dict[str, float]:
        with api.on(0):
            free, total = api.memory_info()
        return {"device_mib": round((total - free) / 2**20, 2)}

    with Engine(bundle, backend=backend) as engine:
        given = _noise(engine, 8)
        stream = engine.stream(given[number % len(given)] for number in range(frames))
        readings = memory.watch(lambda: next(stream), frames, first=min(memory.FIRST, frames // 4), also=device)
        found = flat(readings)
        inside = "Engine.stream, batch 1; device_mib is all memory in use on the GPU, by any process"
        return readings, {"backend": engine.backend.description, **found, "inside": inside}, bool(found["flat"])


def _threads(bundle: Path, backend: str, rounds: int) -> Found:
    with Engine(bundle, backend=backend) as engine:

        def score(frame: Any) -> Answer:
            result = engine(frame)
            return result.score, result.anomaly_map.tobytes(), result.mask.tobytes()

        frames = _noise(engine, 16)
        expected = [score(frame) for frame in frames]
        found = in_threads(score, frames, expected, rounds)
        more = {"backend": engine.backend.description, "inside": "score, map and mask compared bit for bit"}
        return [found], more, found["different"] == 0


def _fit(steps: int, out: Path) -> Found:
    rows: list[dict[str, Any]] = []
    well = True
    for preset, words in FITS.items():
        target = out / f"gpu-fit-{preset}.json"
        command = [sys.executable, str(Path(__file__).with_name("fit.py")), "--preset", preset, *words]
        command += ["--steps", str(steps), "--weights", "random", "--device", "cuda", "--out", str(target)]
        _run(command)
        data = json.loads(target.read_text(encoding="utf-8"))
        rows += fit_rows(preset, data)
        well = well and fit_is_well(data)
    return rows, {"inside": "a step from the choice of the batch to the new weights; see benchmarks/fit.py"}, well


def _run(command: Sequence[str]) -> None:
    """Run in a separate process, so that the other parts do not load torch."""
    if subprocess.run(command, check=False).returncode != 0:
        raise ConfigError(f"benchmarks/{Path(command[1]).name} ended with an error.", "It is printed above.", "")


def _noise(engine: Engine, count: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*engine.backend.frame_size, 3), np.uint8) for _ in range(count)]


def show(part: str, data: Mapping[str, Any], target: Path) -> None:
    """Print a part as a table."""
    rows = data["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if part == "split":
        columns = ["batch", *(f"{name}_ms" for name in SPLIT), *(f"{name}_share" for name in SPLIT)]
    notes = [f"{name}: {data[name]}" for name in ("backend", "flat", "not_here", "inside") if name in data]
    table = [[row.get(name) for name in columns] for row in rows]
    common.print_table(part, columns or ["nothing"], table, [*notes, f"Written to {target}"])


def main(
    bundle: Annotated[Path, typer.Argument(help="a built bundle")],
    parts: Annotated[str | None, typer.Option(help=f"of {','.join(PARTS)}; default: all")] = None,
    backend: Annotated[str, typer.Option(help="for split, soak and threads; as in Engine(backend=...)")] = "auto",
    batch: Annotated[str, typer.Option(help="batch sizes for fps and split")] = "1,8,32",
    frames: Annotated[int, typer.Option(min=100, help="frames of the soak")] = 20000,
    runs: Annotated[int, typer.Option(min=1, help="timed batches of the split")] = 200,
    seconds: Annotated[float, typer.Option(help="for each timing of fps")] = 2.0,
    kinds: Annotated[str, typer.Option(help="of timing, for fps; see fps.py")] = KINDS,
    fit_steps: Annotated[int, typer.Option(min=8, help="steps of each way of fitting")] = 40,
    data: Annotated[Path | None, typer.Option(help="real images for parity")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="the fitted model, for parity and PyTorch's side")] = None,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = common.RESULTS,
) -> None:
    """Measure a bundle on an NVIDIA GPU; print and write the tables."""
    well = True
    try:
        wanted, batches = chosen_parts(parts), batch_sizes(batch)
        gpu = require_gpu()
        open_bundle(bundle)
        out.mkdir(parents=True, exist_ok=True)
        common.print_machine()
        jobs: dict[str, Callable[[], Found]] = {
            "engine": lambda: _engine(bundle, max(batches)),
            "parity": lambda: _parity(bundle, data, checkpoint),
            "fps": lambda: _fps(bundle, batches, seconds, kinds, checkpoint, out),
            "split": lambda: _split(bundle, backend, batches, runs),
            "soak": lambda: _soak(bundle, backend, frames),
            "threads": lambda: _threads(bundle, backend, 50),
            "fit": lambda: _fit(fit_steps, out),
        }
        for part in wanted:
            rows, more, good = jobs[part]()
            name = "gpu-share" if part == "fps" else f"gpu-{part}"  # gpu-fps.json is what fps.py wrote
            facts = common.result(name, rows, gpu=f"{gpu.name} ({gpu.sm})", passed=good, **more)
            show(part, facts, common.write_result(facts, out / f"{name}.json"))
            well = well and good
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
