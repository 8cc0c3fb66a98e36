"""Speed of each preset's graph against the default's and against PaDiM on ResNet-18, in one run.

    python benchmarks/ladder.py [--threads 1] [--seconds 3] [--presets fast,joint,lite,small]

Random weights in the shapes of the packaged backbone; `joint` is the default without its memory. Every graph computes
frames of its model's own size, interleaved with the others, in ONNX Runtime and in OpenVINO. PaDiM (Defard et al. 2021)
takes layers 1 to 3 of ResNet-18 at 256 pixels, 100 of their channels, and a Mahalanobis distance at each of 64 x 64
positions; it is measured in FP32, as anomalib exports it. What the presets find: benchmarks/quality.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.random_model import random_bundle, random_checkpoint, random_config
from saae_runtime.backends import open_backend
from saae_runtime.errors import BackendError, ConfigError, SaaeError
from saae_train.config import PACKAGED_NAME, PRESETS
from saae_train.experiments.timing import Timing, Turn, interleaved, timed_calls

BACKENDS = ("onnxruntime:cpu", "openvino")
JOINT = "joint"
DEFAULT = ("fast", "fp32")
PADIM = "PaDiM, ResNet-18 at 256"
HEADINGS = ("preset", "precision", "backend", "input", "median, ms", "p95, ms", "default FP32 / this")


class PadimResNet18(nn.Module):
    """PaDiM's graph: uint8 N x H x W x 3 -> Mahalanobis distance N x H/4 x W/4; random weights."""

    def __init__(self, side: int = 256, channels: int = 100) -> None:
        super().__init__()
        import timm

        self.network = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2, 3))
        grid = side // 4
        self.register_buffer("chosen", torch.randperm(448)[:channels].sort().values)
        self.register_buffer("mean", torch.randn(channels, grid, grid))
        self.register_buffer("inverse", torch.randn(grid * grid, channels, channels))

    def forward(self, frame: Tensor) -> Tensor:
        x = frame.permute(0, 3, 1, 2).float() / 255.0
        first, *deeper = self.network(x)
        f = torch.cat([first, *(functional.interpolate(y, size=first.shape[2:]) for y in deeper)], dim=1)
        apart = (f[:, self.chosen] - self.mean).flatten(2).permute(2, 0, 1)  # L x N x C
        squared = ((apart @ self.inverse) * apart).sum(dim=2)
        return squared.clamp_min(0).sqrt().T.reshape(frame.shape[0], *first.shape[2:])


def padim_calls(folder: Path, threads: int, side: int = 256) -> dict[str, Callable[[NDArray[np.uint8]], object]]:
    """Backend -> a call that scores a batch of frames of `side` pixels."""
    import onnxruntime
    import openvino

    file = folder / "padim.onnx"
    with torch.no_grad():
        torch.onnx.export(
            PadimResNet18(side).eval(), (torch.zeros(1, side, side, 3, dtype=torch.uint8),), file, dynamo=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return {
        "onnxruntime:cpu": lambda frames: session.run(None, {name: frames}),
        "openvino": lambda frames: compiled([frames]),
    }


def main(
    presets: Annotated[str, typer.Option(help="fast, joint, lite, small")] = "fast,joint,lite,small",
    precisions: Annotated[str, typer.Option(help="of fp32, fp16, bf16, int8, int8-bf16")] = "fp32,bf16,int8,int8-bf16",
    threads: Annotated[int, typer.Option(min=1, help="of the processor")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="for each graph")] = 3.0,
    out: Annotated[Path, typer.Option(help="result file")] = common.RESULTS / "ladder.json",
) -> None:
    """Time the presets; print and write the table."""
    common.use_threads(threads)
    common.print_machine()
    try:
        rows = measured(presets.split(","), precisions.split(","), threads, seconds)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    common.print_table("presets, compute of one frame", HEADINGS, table(rows))
    print(f"Written to {common.write_result(common.result('ladder', rows, threads=threads), out)}")


def measured(presets: list[str], precisions: list[str], threads: int, seconds: float) -> list[dict[str, Any]]:
    """One row per preset, precision and backend that works here, and two of PaDiM.

    Raises:
        ConfigError: an unknown preset.
    """
    turns: dict[tuple[str, str, str], Turn] = {}
    sizes: dict[str, str] = {}
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        for preset in presets:
            base = "fast" if preset == JOINT else preset
            if base not in PRESETS or PRESETS[base].backbone != PACKAGED_NAME:
                raise ConfigError(f"There is no preset {preset!r} to compare.", "", "fast, joint, lite, small")
            config = random_config(PACKAGED_NAME, base)
            if preset == JOINT:
                config = config.with_values({"score": "joint"})
            bundle = random_bundle(random_checkpoint(config), folder / preset, None, precisions)
            height, width = config.input_size
            sizes[preset] = f"{height}x{width}"
            frame = noise.integers(0, 256, (1, height, width, 3), np.uint8)
            for artefact in bundle.manifest.artefacts:
                for backend in BACKENDS:
                    try:
                        opened = open_backend(bundle, backend, 0, artefact.precision, threads=threads)
                    except BackendError:
                        continue
                    stack.callback(opened.close)
                    turns[preset, artefact.precision, backend] = partial(
                        timed_calls, partial(opened.infer, frame, 1e30)
                    )
        sizes[PADIM] = "256x256"
        frame = noise.integers(0, 256, (1, 256, 256, 3), np.uint8)
        for backend, call in padim_calls(folder, threads).items():
            turns[PADIM, "fp32", backend] = partial(timed_calls, partial(call, frame))
        found = interleaved(turns, seconds)
    return [
        {
            "preset": preset,
            "precision": precision,
            "backend": backend,
            "input": sizes[preset],
            "timing": Timing.of(found[preset, precision, backend]).to_json(),
        }
        for preset, precision, backend in turns
    ]


def table(rows: list[dict[str, Any]]) -> list[list[object]]:
    """Rows of a result as cells under HEADINGS; the ratio is to the default's FP32 on the faster backend."""
    reference = [row["timing"]["median_ms"] for row in rows if (row["preset"], row["precision"]) == DEFAULT]
    lines = []
    for row in rows:
        median, p95 = row["timing"]["median_ms"], row["timing"]["p95_ms"]
        ratio = min(reference) / median if reference else None
        lines.append([row["preset"], row["precision"], row["backend"], row["input"], median, p95, ratio])
    return lines


if __name__ == "__main__":
    typer.run(main)
