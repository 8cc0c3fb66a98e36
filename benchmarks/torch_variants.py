"""PyTorch's side of the speed benchmark: the model deployed plainly, behind the backends' protocol.

`pytorch` is the fitted Detector without folding, with the resize before it and the upsample after it on the same
device: the speed without this project. `pytorch:fused` is the fused graph run eagerly: the effect of folding alone.
`pytorch:compile` and `pytorch:cudagraph` are torch.compile and a captured CUDA graph of these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from saae_export.graph.fused import FusedGraph
from saae_runtime.backends.base import Backend, RawOutputs
from saae_runtime.errors import ConfigError
from saae_runtime.frames import to_batch
from saae_runtime.geometry import gaussian_matrix, resize_matrix, upsample_map
from saae_runtime.result import Result
from saae_train.model.detector import Detector

__all__ = ["Deployed", "TorchBackend", "gflop", "matmul_tflops", "score_frames", "torch_backend", "torch_variants"]

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": None}


def torch_variants(device: str) -> dict[str, tuple[str, ...]]:
    """Name -> precisions that are timed on a device unless others are asked for; the first is the reference."""
    if device == "cpu":
        return {"pytorch": ("fp32", "bf16"), "pytorch:fused": ("fp32",)}
    return {
        "pytorch": ("fp32", "bf16"),
        "pytorch:fused": ("fp32", "fp16"),
        "pytorch:compile": ("fp32", "bf16", "fp16"),
        "pytorch:cudagraph": ("fp32", "bf16", "fp16"),
    }


class Deployed(nn.Module):
    """A Detector with the fused graph's interface: frame uint8 N x H x W x 3, threshold -> anomaly map, score, mask.

    Args:
        detector: the fitted model; not copied.
        frame_size: (H, W) of the frames.
        autocast: type that the detector computes in under autocast; resize and upsample stay FP32.
    """

    def __init__(self, detector: Detector, frame_size: tuple[int, int], autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.frame_size = frame_size
        self.autocast = autocast
        size, grid = detector.backbone.input_size, detector.backbone.grid
        self.resizes = frame_size != size
        self.smooths = detector.smoothing > 0
        for name, matrix in (
            ("rows", resize_matrix(frame_size[0], size[0])),
            ("columns", resize_matrix(frame_size[1], size[1]).T),
            ("smooth_rows", gaussian_matrix(grid[0], detector.smoothing)),
            ("smooth_columns", gaussian_matrix(grid[1], detector.smoothing).T),
        ):
            self.register_buffer(name, torch.tensor(np.ascontiguousarray(matrix)))
        self.rows: Tensor
        self.columns: Tensor
        self.smooth_rows: Tensor
        self.smooth_columns: Tensor

    def forward(self, frame: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = frame.permute(0, 3, 1, 2).float()
        if self.resizes:
            x = self.rows @ x @ self.columns
        # Autocast keeps casts of weights only within one block, so a cache gains nothing.
        with torch.autocast(x.device.type, self.autocast, cache_enabled=False) if self.autocast else nullcontext():
            scores = self.detector(x).float()
        if self.smooths:
            scores = self.smooth_rows @ scores @ self.smooth_columns
        anomaly_map = F.interpolate(scores[:, None], self.frame_size, mode="bilinear", align_corners=False)[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2)), (anomaly_map > threshold).to(torch.uint8)


class TorchBackend(Backend):
    """A module with the fused graph's inputs and outputs as a backend; host arrays in and out, as the others.

    Args:
        name, precision: for the table.
        module: moved to the device.
        frame_size: (H, W) of its frames.
        device: `cpu` or `cuda`.
        mode: `eager`, `compile` or `cudagraph`.
    """

    def __init__(
        self,
        name: str,
        precision: str,
        module: nn.Module,
        frame_size: tuple[int, int],
        device: str = "cpu",
        mode: str = "eager",
    ) -> None:
        self.name, self.precision, self.frame_size = name, precision, frame_size
        self.device, self.mode = device, mode
        self._module: Callable[..., Any] = module.to(device)
        if mode == "compile":
            self._module = torch.compile(module, dynamic=False)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, tuple[Tensor, ...]]] = {}
        where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
        self.description = f"PyTorch {torch.__version__}, {mode}, {type(module).__name__} {precision}, {where}"

    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        """See `Backend.infer`."""
        if not frames.flags.writeable:  # a resized frame; PyTorch warns, though nothing here writes to it
            frames = frames.copy()
        outputs = self.run(torch.from_numpy(frames).to(self.device), torch.tensor([threshold], device=self.device))
        anomaly_map, score, mask = (value.cpu().numpy() for value in outputs)
        return RawOutputs(anomaly_map, score, mask.view(np.bool_))

    @torch.inference_mode()
    def run(self, frames: Tensor, threshold: Tensor) -> Sequence[Tensor]:
        """Frames and threshold on the device to outputs there; on a GPU the work may not be finished."""
        if self.mode != "cudagraph":
            outputs: tuple[Tensor, ...] = self._module(frames, threshold)
            return outputs
        if len(frames) not in self._graphs:
            self._graphs[len(frames)] = self._captured(frames, threshold)
        graph, static_frames, static_threshold, outputs = self._graphs[len(frames)]
        static_frames.copy_(frames)
        static_threshold.copy_(threshold)
        graph.replay()
        return outputs

    def _captured(
        self, frames: Tensor, threshold: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, tuple[Tensor, ...]]:
        static = frames.clone(), threshold.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._module(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._module(*static)
        return graph, *static, outputs

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs.clear()


def torch_backend(
    name: str, precision: str, detector: Detector, frame_size: tuple[int, int], device: str
) -> TorchBackend:
    """One of the PyTorch variants.

    FP16 is always the fused graph, whose casts are written out; BF16 is autocast around the Detector.

    Raises:
        ConfigError: a combination that does not exist.
    """
    modes = {
        "pytorch": "eager",
        "pytorch:fused": "eager",
        "pytorch:compile": "compile",
        "pytorch:cudagraph": "cudagraph",
    }
    fused = name == "pytorch:fused" or precision == "fp16"
    if name not in modes or precision not in _AUTOCAST or (name == "pytorch:fused" and precision == "bf16"):
        raise ConfigError(f"There is no {name} at {precision}.", "", f"pytorch has {', '.join(_AUTOCAST)}")
    if modes[name] == "cudagraph" and device == "cpu":
        raise ConfigError(f"{name} needs a GPU.", "PyTorch finds none here.", "leave it out of --backends")
    module: nn.Module
    if fused:
        module = FusedGraph(detector, frame_size, precision)
    else:
        module = Deployed(detector if device == "cpu" else copy.deepcopy(detector), frame_size, _AUTOCAST[precision])
    return TorchBackend(name, precision, module, frame_size, device, modes[name])


def score_frames(
    backend: Backend, frames: Sequence[NDArray[np.uint8]], threshold: float, image_threshold: float
) -> list[Result]:
    """The steps of `Engine` around a backend, for backends without a bundle."""
    outputs = backend.infer(to_batch(frames, backend.frame_size), threshold)
    results = []
    for frame, score, a, mask in zip(frames, outputs.score, outputs.anomaly_map, outputs.mask, strict=True):
        if not np.isfinite(float(a.sum())):
            raise ConfigError(f"{backend.description} gave a map that is not finite.", "", "")
        size = (frame.shape[0], frame.shape[1])
        if a.shape != size:
            a = upsample_map(a, size)
            mask = a > np.float32(threshold)
        results.append(Result(float(score), a, mask, threshold, image_threshold))
    return results


def gflop(graph: Deployed | FusedGraph) -> float:
    """Matrix work of one frame in GFLOP (a multiplication and an addition are two), as PyTorch counts it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    frames = torch.zeros((1, *graph.frame_size, 3), dtype=torch.uint8)
    # Attention written out: the counter does not know every fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        graph(frames, torch.zeros(1))
    return float(counter.get_total_flops()) / 1e9


def matmul_tflops(side: int = 8192, repeats: int = 20) -> float:
    """FP16 rate of one large square product on the GPU, TFLOP/s (median): what a graph could reach."""
    a = torch.randn((side, side), device="cuda", dtype=torch.float16)
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ a
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return 2 * side**3 / float(np.median(found)) / 1e9
