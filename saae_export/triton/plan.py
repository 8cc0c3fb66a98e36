"""Compiles the served graph to a TensorRT plan, with the options of the bundle's engine."""

from __future__ import annotations

from rich.console import Console

from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.tensorrt.library import load_library
from saae_runtime.manifest import Artefact

from ..tensorrt.compile import EngineOptions, compile_engine

__all__ = ["compile_plan"]


def compile_plan(
    engine: Artefact, graph: bytes, name: str, max_batch: int, console: Console | None = None, device: int = 0
) -> bytes:
    """Compile a graph on this machine's GPU, by the options of an engine and up to `max_batch` frames.

    The bundle's own engine has the threshold as an input, with which Triton cannot form batches.

    Args:
        engine: the bundle's engine.
        graph: from `serving_graph`.
        name: the graph's file name, for messages.
        max_batch: frames of the largest batch.
        console: where progress is shown.
        device: GPU number.

    Raises:
        BackendUnavailableError: TensorRT is not installed.
        DeviceError: there is no GPU.
        BackendError: the build fails.
    """
    library = load_library("tensorrt")
    chosen = engine.options
    opt_batch = min(engine.profile.opt, max_batch) if engine.profile is not None else 1
    options = EngineOptions(
        opt_batch=opt_batch,
        max_batch=max_batch,
        opt_level=chosen.get("opt_level"),
        workspace=chosen.get("workspace"),
        version_compatible=bool(chosen.get("version_compatible")),
        hardware_compatible=chosen.get("hardware_compatible"),
    )
    api = CudaApi()
    api.check_driver(library.cuda_major())
    with api.on(device):
        compiled = compile_engine(
            library, graph, name=name, options=options, tf32=engine.precision != "fp32", console=console
        )
    return compiled.data
