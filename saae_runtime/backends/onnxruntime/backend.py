"""Runs a graph in ONNX Runtime, with its CPU, CUDA or TensorRT execution provider."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...errors import (
    BackendError,
    BackendUnavailableError,
    BundleCorruptError,
    ConfigError,
    DeviceError,
)
from ...manifest import Artefact
from ..base import Backend, BackendOptions, RawOutputs, Ticket
from ..cache import cache_folder
from ..graph import without_default
from .binding import BindingPool
from .gpu import gpu_providers
from .quiet import import_onnxruntime, stdout_kept

__all__ = ["INSTALL", "PROVIDERS", "OrtBackend"]

OUTPUTS = ("anomaly_map", "score", "mask")

PROVIDERS = {
    "onnxruntime:cpu": "CPUExecutionProvider",
    "onnxruntime:cuda": "CUDAExecutionProvider",
    "onnxruntime:tensorrt": "TensorrtExecutionProvider",
}
"""Backend name -> ONNX Runtime's name of its execution provider."""

INSTALL = {
    "onnxruntime:cpu": "pip install 'saae[cpu]'",
    "onnxruntime:cuda": "pip install 'saae[cuda]'",
    "onnxruntime:tensorrt": "pip install 'saae[cuda]' tensorrt, in the version that this ONNX Runtime was built for",
}
"""Backend name -> what to type to get it."""

_MAX_BATCH = {
    "onnxruntime:cpu": 8,
    "onnxruntime:cuda": 32,
    "onnxruntime:tensorrt": 32,
}


class OrtBackend(Backend):
    """An ONNX graph of a bundle in an ONNX Runtime session.

    On CUDA and TensorRT, input and outputs live in device buffers that are allocated once per batch size and bound to
    the session; elsewhere the session reads and writes host arrays. On CUDA a run's launches are recorded in a CUDA
    graph and replayed, unless `cuda_graph=False` or the graph has nodes for which the provider has no kernel.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        artefact: Artefact,
        device: int,
        options: BackendOptions,
    ) -> None:
        ort = import_onnxruntime()
        self.name = name
        self.precision = artefact.precision
        self.frame_size = (bundle.manifest.frame.height, bundle.manifest.frame.width)
        self._ort = ort
        self._file = bundle.file(artefact.file)
        self.slots = options.slots or (1 if name == "onnxruntime:cpu" else 2)  # on a GPU, copies overlap computation
        self._pool: BindingPool | None = None
        self._session, details = self._open(bundle, artefact, device, options)
        self.max_batch = self._largest_batch(options)
        self.description = f"ONNX Runtime {ort.__version__}, {details}, {artefact.precision.upper()} {artefact.file}"
        self._workers = ThreadPoolExecutor(self.slots, "saae-infer") if self.slots > 1 else None
        if options.warm_up:
            # The first run allocates arenas and, on a GPU, picks kernels; do that now, not in a frame.
            self.infer(np.full((1, *self.frame_size, 3), 128, np.uint8), 0.0)

    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        """See `Backend.infer`. Sessions are thread-safe; bound buffers are handed to one call at a time."""
        limit = np.array([threshold], np.float32)
        try:
            if self._pool is not None:
                anomaly_map, score, mask = self._pool.run(frames, limit)
            else:
                anomaly_map, score, mask = self._session.run(OUTPUTS, {"frame": frames, "threshold": limit})
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise DeviceError(
                f"{self.description}: the inference of {len(frames)} frames failed.",
                _first_line(error),
                "fewer frames at once (max_batch=1); if the device is lost, open a new engine",
            ) from error
        return RawOutputs(anomaly_map, score, mask.view(np.bool_))

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        """See `Backend.submit`. With several slots, each batch in flight has a thread: ONNX Runtime's runs block."""
        if self._workers is None:
            return super().submit(frames, threshold)
        return Ticket(self._workers.submit(self.infer, frames, threshold))

    def collect(self, ticket: Ticket) -> RawOutputs:
        """See `Backend.collect`."""
        if isinstance(ticket.payload, Future):
            outputs: RawOutputs = ticket.payload.result()
            return outputs
        return super().collect(ticket)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._workers is not None:
            self._workers.shutdown(wait=True)
        self._pool = None
        self._session = None

    def _open(self, bundle: Bundle, artefact: Artefact, device: int, options: BackendOptions) -> tuple[Any, str]:
        if self.name == "onnxruntime:cpu":
            session, details = self._open_cpu(artefact, options)
            self._check_graph(session)
            return session, details
        if self.name == "onnxruntime:cuda" and options.cuda_graph:
            try:
                return self._open_gpu(bundle, device, options, graphs=True)
            except BackendUnavailableError:
                raise
            except BackendError as error:
                refused = error
            opened = self._open_gpu(bundle, device, options, graphs=False)
            warnings.warn(
                f"{self.name} runs without a CUDA graph: recording was refused ({refused.why}). Results are the same; "
                "each launch costs more CPU time. cuda_graph=False silences this.",
                RuntimeWarning,
                stacklevel=2,
            )
            return opened
        return self._open_gpu(bundle, device, options, graphs=False)

    def _open_cpu(self, artefact: Artefact, options: BackendOptions) -> tuple[Any, str]:
        # The optimised graph is not kept on disk: for 44 MB that saves 0.05 s of 0.15 s at the start, and as much is
        # spent on checking a second file of the model's size.
        settings = self._settings(options)
        levels = self._ort.GraphOptimizationLevel
        # Full optimisation of an FP16 graph on the CPU crashes in several releases; basic does not.
        basic = artefact.precision == "fp16"
        settings.graph_optimization_level = levels.ORT_ENABLE_BASIC if basic else levels.ORT_ENABLE_ALL
        threads = f"{options.threads} threads" if options.threads else "all threads"
        return self._session_of(settings, str(self._file), "CPU", ["CPUExecutionProvider"]), f"CPU, {threads}"

    def _open_gpu(self, bundle: Bundle, device: int, options: BackendOptions, graphs: bool) -> tuple[Any, str]:
        """A session, its bound buffers and, with `graphs`, a recorded graph for single frames.

        Raises:
            BackendError: it cannot be loaded, or not be recorded.
            BundleCorruptError: the graph is not a fused graph.
        """
        if hasattr(self._ort, "preload_dlls"):  # finds CUDA and cuDNN where pip put them
            with stdout_kept():
                self._ort.preload_dlls()
        tensorrt = self.name == "onnxruntime:tensorrt"
        cache = cache_folder(bundle, options.cache) if tensorrt else None
        batch = options.max_batch or _MAX_BATCH[self.name]
        providers = gpu_providers(tensorrt, device, self.frame_size, batch, cache, graphs)
        label = "TensorRT" if tensorrt else "CUDA"
        # TensorRT would treat T's default as a constant.
        model = self._without_default() if tensorrt else str(self._file)
        session = self._session_of(self._settings(options), model, label, providers)
        self._check_graph(session)
        sets = max(self.slots, 2)
        self._pool = BindingPool(self._ort, session, "cuda", device, self.frame_size, sets, graphs)
        if graphs:
            try:
                self._pool.run(np.zeros((1, *self.frame_size, 3), np.uint8), np.zeros(1, np.float32))
            except Exception as error:  # ONNX Runtime's own exceptions share no base class
                raise BackendError(
                    f"{self._file} cannot be recorded.", _first_line(error), "cuda_graph=False"
                ) from error
        return session, f"{label} device {device}{', CUDA graph' if graphs else ''}"

    def _without_default(self) -> bytes:
        try:
            return without_default(self._file.read_bytes(), "threshold")
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> BundleCorruptError:
        return BundleCorruptError(f"{self._file} cannot be read.", _first_line(error), "copy the bundle again")

    def _settings(self, options: BackendOptions) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 3  # only errors; its warnings are about details of the graph
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        return settings

    def _session_of(self, settings: Any, model: str | bytes, label: str, providers: list[Any] | None = None) -> Any:
        try:
            with stdout_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a missing provider is an error here, see below
                # Its own fallback would open a slower provider and hide the error.
                session = self._ort.InferenceSession(
                    model, sess_options=settings, providers=providers, enable_fallback=0
                )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} ({label}) cannot load {self._file}.",
                _first_line(error),
                "pip install --upgrade onnxruntime; if that does not help: saae-export verify the bundle",
            ) from error
        wanted = PROVIDERS[self.name]
        if wanted not in session.get_providers():
            # ONNX Runtime goes on with the CPU when a provider's libraries do not load.
            raise BackendUnavailableError(
                f"The backend {self.name} cannot be used here.",
                f"{wanted} is there but did not load: a library that it needs (CUDA, cuDNN, TensorRT) is missing or of "
                "another version",
                f"{INSTALL[self.name]}; saae-export doctor shows what is missing",
            )
        if hasattr(session, "disable_fallback"):
            session.disable_fallback()
        return session

    def _check_graph(self, session: Any) -> None:
        try:
            why = self._graph_problem(session)
        except Exception as error:  # names that are no UTF-8 are refused by ONNX Runtime's own conversion
            raise self._unreadable(error) from error
        if why:
            raise BundleCorruptError(
                f"{self._file} is not a graph of saae.", why, "rebuild the bundle: saae-export build"
            )

    def _graph_problem(self, session: Any) -> str:
        """How inputs and outputs differ from those of the fused graph; empty if they do not."""
        inputs = {item.name: item for item in session.get_inputs()}
        inputs.update({item.name: item for item in session.get_overridable_initializers()})
        outputs = {item.name for item in session.get_outputs()}
        frame = inputs.get("frame")
        height, width = self.frame_size
        if frame is None or "threshold" not in inputs or not outputs >= set(OUTPUTS):
            return f"It has inputs {', '.join(inputs)} and outputs {', '.join(sorted(outputs))}."
        if frame.type != "tensor(uint8)" or list(frame.shape[1:]) != [height, width, 3]:
            return f"Its frame is {frame.type} {frame.shape}; the manifest says uint8 N x {height} x {width} x 3."
        return ""

    def _largest_batch(self, options: BackendOptions) -> int:
        fixed = next(item for item in self._session.get_inputs() if item.name == "frame").shape[0]
        if isinstance(fixed, int):
            if fixed != 1 or (options.max_batch or 1) != 1:
                raise ConfigError(
                    f"{self._file} takes batches of exactly {fixed}.", "Its batch is not dynamic.", "max_batch=1"
                )
            return 1
        return options.max_batch or _MAX_BATCH[self.name]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
