"""Options of ONNX Runtime's CUDA and TensorRT execution providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["gpu_providers"]


def gpu_providers(
    tensorrt: bool, device: int, size: tuple[int, int], max_batch: int, cache: Path | None
) -> list[tuple[str, dict[str, Any]]]:
    """Providers in order of preference, with their options.

    Args:
        tensorrt: TensorRT first, CUDA for what it does not take; else CUDA alone.
        device: GPU number.
        size: (height, width) of the graph's frame.
        max_batch: largest batch.
        cache: folder for compiled engines, or None.
    """
    cuda: dict[str, Any] = {
        "device_id": str(device),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 would round an FP32 graph to 10 bits, away from what its thresholds were calibrated with.
        "use_tf32": "0",
    }
    providers: list[tuple[str, dict[str, Any]]] = [("CUDAExecutionProvider", cuda)]
    if tensorrt:
        height, width = size

        def shape(batch: int) -> str:
            return f"frame:{batch}x{height}x{width}x3"

        engine: dict[str, Any] = {
            "device_id": str(device),
            # Without a range it would compile anew for every batch size that comes along.
            "trt_profile_min_shapes": shape(1),
            "trt_profile_opt_shapes": shape(1),
            "trt_profile_max_shapes": shape(max_batch),
        }
        # `trt_fp16_enable` stays off, for an FP16 graph too: without it the provider builds strongly typed networks
        # (onnxruntime pull request 18707), which obey the graph's own types, sums in FP32 among them.
        if cache is not None:
            engine.update(
                trt_engine_cache_enable="1",
                trt_engine_cache_path=str(cache),
                trt_timing_cache_enable="1",
                trt_timing_cache_path=str(cache),
            )
        providers.insert(0, ("TensorrtExecutionProvider", engine))
    return providers
