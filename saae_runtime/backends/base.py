"""The protocol of all inference backends, between Engine and the libraries that run the graph."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendUnavailableError, ConfigError, shown

if TYPE_CHECKING:
    from ..manifest import Artefact

__all__ = ["Backend", "BackendOptions", "Candidate", "RawOutputs", "Ticket"]


_MOST = 1 << 16  # threads, slots, frames in a batch


@dataclass(frozen=True)
class RawOutputs:
    """The graph's outputs, on the host and owned by the caller (never overwritten by a later call).

    Attributes:
        anomaly_map: float32 N x H x W, at the graph's frame size (paper eq. 3, upsampled).
        score: float32 N.
        mask: bool N x H x W, anomaly_map > T.
    """

    anomaly_map: NDArray[np.float32]
    score: NDArray[np.float32]
    mask: NDArray[np.bool_]


@dataclass
class Ticket:
    """Work of `submit`, to be collected once by `collect`. `payload` is private to the backend."""

    payload: Any


@dataclass(frozen=True)
class Candidate:
    """A backend that could run a bundle.

    Attributes:
        name: for instance `onnxruntime:cuda`.
        artefact: the file that it would run; None if the bundle has none for it.
        why_not: why it cannot be used here; None if it can.
        note: remark on the choice, shown by `Engine.explain`.
        cure: what to install or do, with `why_not`.
    """

    name: str
    artefact: Artefact | None
    why_not: str | None = None
    note: str = ""
    cure: str = ""


@dataclass(frozen=True)
class BackendOptions:
    """Options of all backends; each uses those that apply to it.

    Attributes:
        threads: CPU threads of one call; None leaves it to the library.
        hint: `latency` (one frame as soon as possible) or `throughput` (most frames a second).
        max_batch: frames in one call of the graph; larger batches are split. None leaves it to the backend.
        cache: where compiled models are kept. None: beside the bundle, or in the user's cache folder if that is
            read-only, if compiling takes long (GPU, NPU); True: the same in any case; a folder; False: nowhere.
        cuda_graph: whether launches are captured in a CUDA graph and replayed.
        slots: batches in flight in `stream`; None leaves it to the backend.
        device_type: OpenVINO device: `CPU`, `GPU` or `NPU`; None takes the CPU.
        arithmetic: of OpenVINO: `f32`, `bf16` or `f16`. None: the one that the thresholds were calibrated in. With
            another, scores do not fit the thresholds, as the backend's description says.
        warm_up: whether to run one inference when the backend is opened.
        measure: whether `auto` times the backends, once on each machine, and takes the fastest; False: the first in a
            fixed order. None: True, unless the environment has SAAE_MEASURE=0.
    """

    threads: int | None = None
    hint: str = "latency"
    max_batch: int | None = None
    cache: bool | str | Path | None = None
    cuda_graph: bool = True
    slots: int | None = None
    device_type: str | None = None
    arithmetic: str | None = None
    warm_up: bool = True
    measure: bool | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "max_batch", "slots"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST
            if value is not None and not whole:
                cure = f"give {name} as a whole number from 1 to {_MOST}"
                raise ConfigError(f"{name}={shown(value)} is not possible.", "", cure)
        for name, known in (
            ("hint", ("latency", "throughput")),
            ("device_type", ("CPU", "GPU", "NPU", None)),
            ("arithmetic", ("f32", "bf16", "f16", None)),
        ):
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))) or value not in known:
                cure = "give " + " or ".join(repr(item) for item in known if item is not None)
                raise ConfigError(f"{name}={shown(value)} is not known.", "", cure)
        if not isinstance(self.measure, (bool, type(None))):
            raise ConfigError(f"measure={shown(self.measure)} is not possible.", "", "give True or False")
        if not isinstance(self.cache, (bool, str, Path, type(None))):
            raise ConfigError(f"cache={shown(self.cache)} is not possible.", "", "give a folder, True or False")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> BackendOptions:
        """Options from keyword arguments.

        Raises:
            ConfigError: an unknown name, or a value out of range.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise ConfigError(
                    f"Backends have no option {name!r}.",
                    f"They have: {', '.join(names)}.",
                    f"did you mean {near[0]}?" if near else "",
                )
        return cls(**options)


class Backend(ABC):
    """Runs one artefact of a bundle.

    A backend's module also has two functions:

        candidates(bundle, device, precision=None) -> list[Candidate]   # never raises for what is missing
        open_backend(bundle, name, device, precision, options: BackendOptions) -> Backend
            # raises BackendUnavailableError (not installed), EngineIncompatibleError, DeviceError, ...

    Attributes:
        name: for instance `onnxruntime:cpu`.
        description: text with library, version, device and file.
        precision: one of `saae_runtime.manifest.PRECISIONS`: whose thresholds apply.
        frame_size: (height, width) of the graph's input, in pixels.
        max_batch: most frames of one call; None: any number.
        slots: batches that may be in flight between `submit` and `collect`.
        takes_device_arrays: whether `infer` also takes frames on the GPU.
    """

    name: str
    description: str
    precision: str
    frame_size: tuple[int, int]
    max_batch: int | None = None
    slots: int = 1

    @property
    def takes_device_arrays(self) -> bool:
        return type(self).infer_on_device is not Backend.infer_on_device

    @abstractmethod
    def infer(self, frames: NDArray[np.uint8], threshold: float) -> RawOutputs:
        """Run a batch; may be called from several threads.

        Args:
            frames: uint8 N x H x W x 3, C-contiguous, H x W = `frame_size`, 1 <= N <= `max_batch`.
            threshold: pixel threshold T of the mask.

        Raises:
            DeviceError: the device failed.
        """

    def submit(self, frames: NDArray[np.uint8], threshold: float) -> Ticket:
        """Start a batch; at most `slots` may be in flight. By default it runs at once.

        Do not change `frames` before the ticket is collected.
        """
        return Ticket(self.infer(frames, threshold))

    def collect(self, ticket: Ticket) -> RawOutputs:
        """Wait for a batch. Every ticket is collected exactly once, in the order of `submit`."""
        outputs: RawOutputs = ticket.payload
        return outputs

    def infer_on_device(self, frames: Any, threshold: float) -> Any:
        """Run a batch and leave the outputs on the GPU, if the backend can; frames may be there, too.

        Raises:
            BackendUnavailableError: this backend cannot.
        """
        raise BackendUnavailableError(
            f"{self.name} leaves no outputs on the GPU.", "", "open the engine with backend='tensorrt'"
        )

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice. No call is in flight."""
