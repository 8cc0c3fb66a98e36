"""Time a bundle on every backend that works here, together with PyTorch, in one process.

    python benchmarks/fps.py BUNDLE [--checkpoint DIR]
    python benchmarks/fps.py --random [--model vit_base_patch16_384] [--components K] [--whole] [--dfr]
        [--frame-size 1024x1024] [--bake] [--batch 1,8,32] [--backends ...] [--precisions fp32,bf16,...]
        [--kinds compute,frame,...] [--seconds 10] [--threads N] [--device cpu|cuda] [--out FILE]

Kinds of timing, all from arrays in host memory to arrays in host memory unless said otherwise:

  compute       a batch of frames at the graph's size through `backend.infer`: anomaly map, score and mask. Copies to
                and from a GPU are inside; a resize is inside only where it is baked into the graph.
  frame         camera frames to `Result`s by calling the Engine: host resize where the graph has another size,
                inference, map brought to the frame's size, mask, decision. PyTorch's variants take the same steps.
  stream        `Engine.stream` over camera frames, once its pipeline is full: time per batch.
  stream graph  the same over frames of the graph's size, to compare with compute.
  trigger       `Engine.stream` over a source slower than the engine: time from a batch of camera frames given to its
                results out.
  device        GPU only: a batch that is on the GPU already, outputs left there, synchronised.

Where RAPL is readable (Linux, usually as root), compute also has the energy of the processor's packages per frame, idle
power included.

The reference of every ratio is PyTorch eager FP32 of the unfolded model, resize and upsample included, on the same
device, with the same threads, in the same rounds (streams: its frame or compute timing). On a GPU, FP32 is FP32 in
every product: TF32, PyTorch's default for convolutions, is off. Variants are timed interleaved, in
turns of about half a second (saae_train/experiments/timing.py). A model of random weights (--random, or a bundle
without its checkpoint for PyTorch's side) is as fast as a fitted one; if both sides have the same weights, their maps
are compared first. The file is written anew after every batch size, so that a run that is cut short leaves the sizes
that were done.

`pytorch:whole` (--whole) is the same model with the autoencoder in all U channels instead of k principal components:
the ratio to it includes what the components save, not only what a backend saves.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.fps_table import INSIDE, KINDS, add_ratios, saae_to_dfr, show
from saae_runtime.bundle import Bundle, open_bundle
from saae_runtime.errors import BackendError, ConfigError, SaaeError
from saae_runtime.manifest import PRECISIONS

if TYPE_CHECKING:  # torch comes after the threads are set
    from benchmarks.fps_variants import Settings, Variant
    from saae_train.model.detector import Detector

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")


def run(
    bundle: Bundle,
    detector: Detector,
    settings: Settings,
    weights: str,
    same_weights: bool = True,
    keep: Callable[[dict[str, Any]], object] = lambda data: None,
) -> dict[str, Any]:
    """Time everything and return the result, ready to be written.

    Args:
        bundle: what the backends run.
        detector: what PyTorch runs.
        settings: what is timed.
        weights: description of the weights' origin.
        same_weights: whether bundle and detector hold the same model.
        keep: given the result of the batch sizes so far, after each.

    Raises:
        SaaeError: a requested backend is not available, or fails.
    """
    import torch

    from benchmarks.fps_variants import open_variants
    from benchmarks.torch_variants import Deployed, gflop, matmul_tflops
    from saae_train.fitting.precision import matmul_precision, reached

    frame = bundle.manifest.frame
    graph_size = (frame.height, frame.width)
    place = torch.device(settings.device)
    with matmul_precision("fp32", place), common.PeakMemory() as memory, ExitStack() as stack:
        arithmetic = reached(place, convolutions=True)
        variants, absent = open_variants(bundle, detector, settings, same_weights)
        for variant in variants:
            stack.callback(variant.close)
        facts = [_facts(variant) for variant in variants]
        rate = matmul_tflops() if settings.device == "cuda" else None
        work = round(gflop(Deployed(detector, graph_size)), 2)
        rows: list[dict[str, Any]] = []
        data: dict[str, Any] = {}
        for batch in settings.batches:
            rows += _timed(variants, batch, settings, absent)
            add_ratios(rows)
            data = {
                **_about(bundle, settings, rows, arithmetic, weights, work),
                "variants": facts,
                "not_here": absent,
                "matmul_fp16_tflops": None if rate is None else round(rate, 1),
            }
            keep(data)
    return {**data, "peak_memory_gib": round(memory.gib, 2)}


def _about(
    bundle: Bundle,
    settings: Settings,
    rows: list[dict[str, Any]],
    arithmetic: str,
    weights: str,
    work: float,
) -> dict[str, Any]:
    import torch

    model = bundle.manifest.model
    return common.result(
        "fps",
        rows,
        settings={
            "frame_size": list(settings.frame_size),
            "graph_size": [bundle.manifest.frame.height, bundle.manifest.frame.width],
            "batches": list(settings.batches),
            "seconds": settings.seconds,
            "threads": settings.threads,
            "torch_threads": torch.get_num_threads(),
            "torch_fp32_products": arithmetic,
            "device": settings.device,
            "hint": settings.hint,
            "environment": {name: os.environ[name] for name in _LIMITS if name in os.environ},
        },
        model={
            "category": bundle.manifest.category,
            "backbone": bundle.manifest.backbone.name,
            "input_size": [model.height, model.width],
            "layers": list(model.layers),
            "latent": model.latent_dim,
            "components": model.components,
            "preset": model.preset,
            "weights": weights,
            "gflop_per_frame": work,
        },
        inside=INSIDE,
        reference="pytorch fp32",
        saae_to_dfr=saae_to_dfr(rows, bundle.manifest.backbone.name),
    )


def _timed(
    variants: Sequence[Variant], batch: int, settings: Settings, absent: list[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.energy import Metered, find_rapl
    from benchmarks.interleaved import stream, trigger
    from saae_train.experiments.timing import Turn, interleaved, timed_calls

    rng = np.random.default_rng(0)
    camera = [rng.integers(0, 256, (*settings.frame_size, 3), np.uint8) for _ in range(max(batch, 2))]
    usable = []
    for variant in variants:
        most = variant.backend.max_batch
        if most is not None and batch > most:
            why = f"batch {batch} is above the {most} that it takes"
            absent.append({"backend": variant.name, "precision": variant.precision, "why": why})
        else:
            usable.append(variant)
    turns: dict[tuple[str, Any], Turn] = {}
    meter = find_rapl()
    kinds = settings.kinds or KINDS
    for variant in usable:
        frames = rng.integers(0, 256, (batch, *variant.backend.frame_size, 3), np.uint8)
        compute = partial(timed_calls, partial(variant.infer, frames))
        turns["compute", variant.key] = compute if meter is None else Metered(compute, meter)
        turns["frame", variant.key] = partial(timed_calls, partial(variant.score, camera[:batch]))
        if variant.engine is not None:
            turns["stream", variant.key] = stream(variant.engine, camera, batch)
            turns["stream graph", variant.key] = stream(variant.engine, list(frames), batch)
            turns["trigger", variant.key] = trigger(variant.engine, camera, batch)
        if settings.device == "cuda" and (call := _on_device(variant, frames)) is not None:
            turns["device", variant.key] = partial(timed_calls, call)
    turns = {key: turn for key, turn in turns.items() if key[0] in kinds}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"batch {batch}: warm-up", total=len(turns))
        for turn in turns.values():  # buffers, kernels and plans of this batch size are made here
            turn(0.0)
            bar.advance(task)
        for turn in turns.values():
            if isinstance(turn, Metered):  # exclude what is done once
                turn.joules, turn.calls = 0.0, 0
        bar.update(task, description=f"batch {batch}: turns")
        found = interleaved(
            turns, settings.seconds, progress=lambda n, total: bar.update(task, completed=n, total=total)
        )
    for kind in KINDS:
        for variant in usable:
            if (kind, variant.key) not in found:
                continue
            timing = common.Timing.of(found[kind, variant.key])
            turn = turns[kind, variant.key]
            spent = {"joules": round(turn.joules / (turn.calls * batch), 4)} if isinstance(turn, Metered) else {}
            yield {
                "backend": variant.name,
                "precision": variant.precision,
                "kind": kind,
                "batch": batch,
                "timing": timing.to_json(),
                "fps": round(batch * timing.per_second, 3),
                **spent,
            }


def _on_device(variant: Variant, frames: np.ndarray[Any, Any]) -> Any:
    """A call that starts and ends on the GPU, or None if the backend has none."""
    import torch

    from benchmarks.torch_variants import TorchBackend

    backend = variant.backend
    if isinstance(backend, TorchBackend):
        inputs = torch.from_numpy(frames).cuda(), torch.full((1,), 1.0, device="cuda")

        def call() -> None:
            backend.run(*inputs)
            torch.cuda.synchronize()

        return call
    if not backend.takes_device_arrays:
        return None
    there = torch.from_numpy(frames).cuda()

    def call_backend() -> None:
        with backend.infer_on_device(there, variant.limits[0]) as outputs:
            outputs.synchronize()

    return call_backend


def _facts(variant: Variant) -> dict[str, Any]:
    return {
        "backend": variant.name,
        "precision": variant.precision,
        "description": variant.backend.description,
        "slots": variant.backend.slots,
        "memory_mib": round(variant.memory_mib, 1),
        "device_mib": None if variant.device_mib is None else round(variant.device_mib, 1),
        "map_error": variant.map_error,
    }


@contextmanager
def _random(options: Mapping[str, Any], settings: Settings, precisions: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """(bundle, detector, text on the weights, same weights) of a model with random weights; on a GPU with engines."""
    from rich.console import Console

    from benchmarks.random_model import random_bundle, random_checkpoint, random_config
    from saae_export.pipeline.options import parse_frame_size

    console = Console(stderr=True)
    checkpoint = random_checkpoint(random_config(**options["model"]))
    size = settings.frame_size if options["bake"] else parse_frame_size("model", None)
    with tempfile.TemporaryDirectory() as folder, console.status("exporting random weights ..."):
        bundle = random_bundle(checkpoint, Path(folder) / "bundle", size, precisions)
        if settings.device == "cuda":
            bundle = _with_engines(bundle, settings, precisions, options["opt_batch"], console)
        yield bundle, checkpoint.detector, "random (no quality, for speed only)", True


def _with_engines(
    bundle: Bundle, settings: Settings, precisions: Sequence[str], opt_batch: int | None, console: Any
) -> Bundle:
    from saae_export.tensorrt.compile import EngineOptions, build_engine

    most = max(settings.batches)
    options = EngineOptions(1, min(opt_batch or most, most), most)
    for library in ("tensorrt", "tensorrt-rtx"):
        for precision in (name for name in precisions if name in ("fp32", "fp16")):
            try:
                built = build_engine(bundle, library=library, precision=precision, options=options)
            except BackendError as error:
                console.print(f"no {library} {precision} engine: {error.what} {error.why}", markup=False)
                continue
            bundle = built.bundle
    return bundle


@contextmanager
def _given(path: Path, checkpoint: Path | None) -> Iterator[tuple[Any, ...]]:
    from benchmarks.random_model import like
    from saae_export.parity.pytorch import load_reference

    bundle = open_bundle(path)
    if checkpoint is not None:
        yield bundle, load_reference(bundle, checkpoint).detector, bundle.manifest.backbone.weights_source, True
    else:
        weights = "the bundle's; PyTorch's side has random weights of the same shapes (no --checkpoint)"
        yield bundle, like(bundle.manifest).detector, weights, False


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from "1,8,32"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{option} {text} is not a list of whole numbers.", "", f"{option} 1,8,32")
    return tuple(int(part) for part in parts)


def names(text: str | None) -> tuple[str, ...] | None:
    """Names from "a,b"; None for an empty text."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def main(
    bundle: Annotated[Path | None, typer.Argument(help="a built bundle; or give --random")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="the model that the bundle was built from")] = None,
    random: Annotated[bool, typer.Option("--random", help="a model of random weights, labelled so")] = False,
    model: Annotated[str, typer.Option(help="with --random: timm name")] = "vit_base_patch16_384",
    preset: Annotated[str | None, typer.Option(help="with --random: paper, fast, ...")] = None,
    layers: Annotated[str | None, typer.Option(help="with --random: instead of the preset's")] = None,
    input_size: Annotated[str | None, typer.Option(help="with --random: HEIGHTxWIDTH of the model")] = None,
    latent: Annotated[int | None, typer.Option(help="with --random: V")] = None,
    components: Annotated[int | None, typer.Option(help="with --random: k; 0 = none")] = None,
    bake: Annotated[bool, typer.Option("--bake", help="with --random: bake the camera's size into the graph")] = False,
    opt_batch: Annotated[int | None, typer.Option(help="with --random: batch that engines are tuned for")] = None,
    frame_size: Annotated[str, typer.Option(help="camera frame, HEIGHTxWIDTH")] = "1024x1024",
    batch: Annotated[str | None, typer.Option(help="batch sizes; default 1, on a GPU 1,8,32")] = None,
    backends: Annotated[str | None, typer.Option(help="names, comma-separated; default: all that work here")] = None,
    precisions: Annotated[str | None, typer.Option(help="fp32,fp16,bf16,int8,int8-bf16; default: all")] = None,
    kinds: Annotated[str | None, typer.Option(help=f"of {', '.join(KINDS)}; default: all")] = None,
    seconds: Annotated[float, typer.Option(help="for each timing of each variant")] = 10.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every usable core")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    hint: Annotated[str, typer.Option(help="OpenVINO: latency or throughput")] = "latency",
    dfr: Annotated[bool, typer.Option("--dfr", help="time the paper's speed baseline as well")] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="with --random: time the model without components, too")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Time every backend beside PyTorch; print and write the tables."""
    try:
        if (bundle is None) != random:
            raise ConfigError("Give a bundle, or --random, and not both.", "", "python benchmarks/fps.py --random")
        if seconds <= 0 or device not in ("auto", "cpu", "cuda"):
            raise ConfigError("--seconds or --device is not possible.", "", "--seconds 10 --device auto")
        common.use_threads(threads or common.usable_cores())
        settings = _settings(frame_size, batch, names(backends), names(precisions), seconds, threads, device, hint, dfr)
        settings = replace(settings, whole=whole, kinds=_kinds(kinds))
        options = {
            "model": {
                "backbone": model,
                "preset_name": preset,
                "layers": None if layers is None else numbers(layers, "--layers"),
                "input_size": None if input_size is None else _size(input_size),
                "latent": latent,
                "components": components,
            },
            "bake": bake,
            "opt_batch": opt_batch,
        }
        common.print_machine()
        source = _random(options, settings, _graphs(settings)) if bundle is None else _given(bundle, checkpoint)
        with source as (opened, detector, weights, same):
            data = run(opened, detector, settings, weights, same, lambda data: common.write_result(data, out))
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    show(data, common.write_result(data, out))


def _kinds(text: str | None) -> tuple[str, ...] | None:
    """Kinds of timing from "compute,device".

    Raises:
        ConfigError: an unknown one.
    """
    wanted = names(text)
    if wanted is not None and (not wanted or set(wanted) - set(KINDS)):
        raise ConfigError(f"--kinds {text} is not possible.", f"Known are: {', '.join(KINDS)}.", "--kinds compute")
    return wanted


def _settings(
    frame_size: str,
    batch: str | None,
    backends: tuple[str, ...] | None,
    precisions: tuple[str, ...] | None,
    seconds: float,
    threads: int | None,
    device: str,
    hint: str,
    dfr: bool,
) -> Settings:
    import torch

    from benchmarks.fps_variants import Settings, check_names

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda is not possible.", "PyTorch finds no GPU.", "--device cpu")
    settings = Settings(
        frame_size=_size(frame_size),
        batches=numbers(batch or ("1" if device == "cpu" else "1,8,32"), "--batch"),
        backends=backends,
        precisions=precisions,
        seconds=seconds,
        threads=threads or common.usable_cores(),
        device=device,
        hint=hint,
        dfr=dfr,
    )
    check_names(settings)
    if min(settings.batches) < 1:
        raise ConfigError("--batch is not possible.", "A batch has one frame or more.", "--batch 1,8")
    return settings


def _graphs(settings: Settings) -> tuple[str, ...]:
    """Precisions of a bundle of random weights: FP32 always, others if wanted."""
    return tuple(name for name in PRECISIONS if name == "fp32" or name in (settings.precisions or PRECISIONS))


def _size(text: str) -> tuple[int, int]:
    from saae_export.pipeline.options import parse_frame_size

    size = parse_frame_size(text, None)
    if size is None:
        raise ConfigError(f"{text} is not a size.", "", "give HEIGHTxWIDTH, for instance 1024x1024")
    return size


if __name__ == "__main__":
    typer.run(main)
