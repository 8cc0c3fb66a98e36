"""Options of ONNX Runtime's CUDA and TensorRT providers, and a check for TensorRT's libraries."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["gpu_providers", "load_tensorrt"]

_SONAME = re.compile(rb"libnvinfer\.so\.\d+")


@lru_cache(maxsize=1)
def load_tensorrt(package: Path) -> str:
    """Load the TensorRT that ONNX Runtime's provider was linked with, from the system or from its PyPI package.

    The provider itself only finds libraries that are on the system's path or loaded already.

    Args:
        package: ONNX Runtime's folder.

    Returns:
        Why it cannot be loaded, or "".
    """
    try:
        named = _SONAME.search((package / "capi" / "libonnxruntime_providers_tensorrt.so").read_bytes())
    except OSError as error:
        return f"its TensorRT provider cannot be read ({error})"
    if named is None:
        return ""  # libraries have other names on this system: let the provider try
    soname = named.group().decode()
    spec = find_spec("tensorrt_libs")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for name in (soname, *(str(Path(folder) / soname) for folder in folders)):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return ""
    return f"TensorRT ({soname}) is not installed"


def gpu_providers(
    tensorrt: bool, device: int, size: tuple[int, int], max_batch: int, cache: Path | None, graphs: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Providers in order of preference, with their options.

    Args:
        tensorrt: TensorRT first, CUDA for the rest; False: only CUDA.
        device: GPU number.
        size: (height, width) of the graph's frame.
        max_batch: largest batch.
        cache: folder for compiled engines, or None.
        graphs: whether CUDA shall record the launches of a run in a CUDA graph.
    """
    # The first GPU is the default; naming it makes ONNX Runtime 1.26 and later warn at every start.
    place = {"device_id": str(device)} if device else {}
    cuda: dict[str, Any] = {
        **place,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 would round products of an FP32 graph to 10 bits, which its thresholds were not calibrated with.
        "use_tf32": "0",
        **({"enable_cuda_graph": "1"} if graphs else {}),
    }
    providers: list[tuple[str, dict[str, Any]]] = [("CUDAExecutionProvider", cuda)]
    if tensorrt:
        height, width = size

        def shape(batch: int) -> str:
            return f"frame:{batch}x{height}x{width}x3"

        engine: dict[str, Any] = {
            **place,
            # Without a range it would compile again for every batch size.
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
