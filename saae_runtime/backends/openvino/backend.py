"""Runs a graph in OpenVINO: one compiled model for single frames, another for batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...errors import BackendError, BundleCorruptError, ConfigError, DeviceError
from ...files import sha256_bytes
from ...manifest import Artefact
from ..base import Backend, BackendOptions, RawOutputs, Ticket
from ..cache import cache_folder
from ..graph import without_default
from .arithmetic import arithmetic_of, calibrated
from .library import load_library
from .precise import keep_precise, round_the_search

__all__ = ["NAME", "OpenVinoBackend", "properties"]

NAME = "openvino"
_OUTPUTS = ("anomaly_map", "score", "mask")
_MAX_BATCH = 8
_MOST_SLOTS = 8


class OpenVinoBackend(Backend):
    """An ONNX graph of a bundle, compiled by OpenVINO for one device.

    Single frames have a model with a fixed batch of one, which is up to a tenth faster than a dynamic batch, and the
    only kind for an NPU. The model for batches is compiled with the first batch, or at once if `max_batch` is given.
    """

    def __init__(self, bundle: Bundle, artefact: Artefact, options: BackendOptions) -> None:
        self._library = load_library()
        device = self._library.device(options.device_type or "CPU")
        arithmetic = arithmetic_of(device, artefact.precision, options.arithmetic)
        self.name = NAME
        self.precision = artefact.precision
        self.frame_size = (bundle.manifest.frame.height, bundle.manifest.frame.width)
        self._kind = device.kind
        self._file = bundle.file(artefact.file)
        # A CPU compiles in a moment; a GPU or NPU takes seconds, which a cache saves.
        keep = device.kind != "CPU" or options.cache is not None
        self._properties = properties(
            device.kind, arithmetic, options, cache_folder(bundle, options.cache) if keep else None
        )
        data = self._graph()
        model = self._read(data)
        self._check(model)
        free = model.input("frame").partial_shape[0].is_dynamic
        self.max_batch = self._largest_batch(model, free, options)
        self._one = Compiled(lambda: self._compile(model, 1))
        self._one.get()
        self._many: Compiled | None = None
        if self.max_batch > 1:
            sha256 = sha256_bytes(data)
            self._many = Compiled(lambda: self._compile(self._read(self._same(sha256)), None))
        own = calibrated(artefact.precision, device.kind)
        words = arithmetic if arithmetic == own else f"{arithmetic} (thresholds were calibrated in {own})"
        self.description = (
            f"OpenVINO {self._library.version} {device.kind} ({device.name}), {words}, {options.hint}, "
            f"{artefact.precision.upper()} {artefact.file}"
        )
        self.slots = options.slots or self._useful_slots(options)
        if options.warm_up:
            # The first inference allocates memory and picks kernels; do that now, not in a frame.
            self.infer(np.full((1, *self.frame_size, 3), 128, np.uint8), 0.0)
            if self._many is not None and options.max_batch is not None:
                self.infer(np.full((self.max_batch, *self.frame_size, 3), 128, np.uint8), 0.0)

    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        """See `Backend.infer`. Each call has a request for itself."""
        return self.collect(self.submit(frames, threshold))

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        """See `Backend.submit`: OpenVINO's own threads compute."""
        model = self._one if self._many is None or len(frames) == 1 else self._many
        tensor = self._library.module.Tensor
        if not frames.flags.writeable:
            frames = frames.copy()  # OpenVINO lends no memory that it may not write to
        compiled = model.get()
        try:
            request = model.take(compiled)
            request.set_tensor("frame", tensor(frames, shared_memory=True))
            request.set_tensor("threshold", tensor(np.array([threshold], np.float32)))
            request.start_async()
        except Exception as error:  # OpenVINO's exceptions are RuntimeErrors and kin
            raise self._failed(len(frames), error) from error
        return Ticket((model, request, frames))

    def collect(self, ticket: Ticket) -> RawOutputs:
        """See `Backend.collect`."""
        model, request, frames = ticket.payload
        try:
            request.wait()
            anomaly_map, score, mask = (np.array(request.get_tensor(name).data) for name in _OUTPUTS)
        except Exception as error:
            raise self._failed(len(frames), error) from error
        model.give_back(request)
        return RawOutputs(anomaly_map, score, mask.view(np.bool_))

    def close(self) -> None:
        """See `Backend.close`."""
        self._one.close()
        if self._many is not None:
            self._many.close()

    def _graph(self) -> bytes:
        try:
            return without_default(self._file.read_bytes(), "threshold")  # otherwise it would be a constant
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _same(self, sha256: str) -> bytes:
        """Read the graph again; it must be the same file as when the engine was opened."""
        data = self._graph()
        if sha256_bytes(data) != sha256:
            raise BackendError(
                f"{self._file} is another file than when the engine was opened.",
                "The bundle was replaced while it was in use.",
                "close the engine and open the new bundle",
            )
        return data

    def _read(self, data: bytes) -> Any:
        try:
            return self._library.core.read_model(data)
        except Exception as error:
            raise self._not_loaded(error) from error

    def _compile(self, model: Any, batch: int | None) -> Any:
        try:
            if batch is not None:
                model.reshape({"frame": [batch, *self.frame_size, 3]})
            if self._properties["INFERENCE_PRECISION_HINT"] == "bf16" and keep_precise(model):
                round_the_search(model)
                try:
                    return self._library.core.compile_model(model, self._kind, self._properties)
                except RuntimeError:  # a release that reads the mark differently: slower, the same result
                    round_the_search(model, False)
            return self._library.core.compile_model(model, self._kind, self._properties)
        except Exception as error:
            raise self._not_loaded(error) from error

    def _check(self, model: Any) -> None:
        try:
            why = self._graph_problem(model)
        except Exception as error:  # names that are no UTF-8
            raise self._unreadable(error) from error
        if why:
            raise BundleCorruptError(
                f"{self._file} is not a graph of saae.", why, "rebuild the bundle: saae-export build"
            )

    def _graph_problem(self, model: Any) -> str:
        """How inputs and outputs differ from those of the fused graph; empty if they do not."""
        inputs = {name: item for item in model.inputs for name in item.names}
        outputs = {name for item in model.outputs for name in item.names}
        if not inputs.keys() >= {"frame", "threshold"} or not outputs >= set(_OUTPUTS):
            return f"It has inputs {', '.join(sorted(inputs))} and outputs {', '.join(sorted(outputs))}."
        frame, (height, width) = inputs["frame"], self.frame_size
        kind, shape = frame.element_type.get_type_name(), frame.partial_shape
        if kind != "u8" or str(shape).strip("[]").split(",")[1:] != [str(height), str(width), "3"]:
            return f"Its frame is {kind} {shape}; the manifest says u8 N x {height} x {width} x 3."
        return ""

    def _largest_batch(self, model: Any, free: bool, options: BackendOptions) -> int:
        if free:
            return 1 if self._kind == "NPU" else options.max_batch or _MAX_BATCH
        fixed = model.input("frame").partial_shape[0].get_length()
        if fixed != 1 or (options.max_batch or 1) != 1:
            raise ConfigError(
                f"{self._file} takes batches of exactly {fixed}.", "Its batch is not dynamic.", "max_batch=1"
            )
        return 1

    def _useful_slots(self, options: BackendOptions) -> int:
        """Batches in flight of a stream: the throughput hint wants as many as OpenVINO says, latency one."""
        if options.hint != "throughput":
            return 1
        return min(max(2, int(self._one.get().get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))), _MOST_SLOTS)

    def _failed(self, frames: int, error: Exception) -> DeviceError:
        return DeviceError(
            f"{self.description}: the inference of {frames} frames failed.",
            _last_line(error),
            "fewer frames at once (max_batch=1); if the device is lost, open a new engine",
        )

    def _not_loaded(self, error: Exception) -> BackendError:
        return BackendError(
            f"OpenVINO {self._library.version} ({self._kind}) cannot load {self._file}.",
            _last_line(error),
            "pip install --upgrade openvino; if that does not help: saae-export verify the bundle",
        )

    def _unreadable(self, error: Exception) -> BundleCorruptError:
        return BundleCorruptError(f"{self._file} cannot be read.", _last_line(error), "copy the bundle again")


class Compiled:
    """A model that is compiled when first needed, and its requests, one per call."""

    def __init__(self, compile_it: Callable[[], Any]) -> None:
        self._compile_it: Callable[[], Any] | None = compile_it
        self._lock = threading.Lock()
        self._model: Any = None
        self._free: deque[Any] = deque()

    @property
    def is_ready(self) -> bool:
        """Whether it was compiled."""
        return self._model is not None

    def get(self) -> Any:
        """The compiled model; the first call compiles, others wait."""
        with self._lock:
            if self._compile_it is not None:
                self._model = self._compile_it()
                self._compile_it = None  # frees the uncompiled model, which holds the weights again
            return self._model

    def take(self, model: Any) -> Any:
        """An exclusive request."""
        try:
            return self._free.pop()  # last in, first out: a single thread keeps using one warm request
        except IndexError:
            return model.create_infer_request()

    def give_back(self, request: Any) -> None:
        """End the use of a request."""
        self._free.append(request)

    def close(self) -> None:
        """Release the model."""
        self._free.clear()
        self._model = None


def properties(kind: str, arithmetic: str, options: BackendOptions, cache: Path | None) -> dict[str, Any]:
    """OpenVINO's own properties for a kind of device; an unknown one is an error there."""
    found: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "PERFORMANCE_HINT": options.hint.upper(),
    }
    if kind == "CPU" and options.threads is not None:
        found["INFERENCE_NUM_THREADS"] = options.threads
    if cache is not None:
        found["CACHE_DIR"] = str(cache)
    return found


def _last_line(error: Exception) -> str:
    """The last line of an exception; OpenVINO's begin with positions in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
