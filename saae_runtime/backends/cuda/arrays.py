"""Arrays on the GPU: frames taken without a host copy, and outputs returned the same way."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BackendUnavailableError, FrameError, SaaeError
from .api import CudaApi

__all__ = ["DeviceArray", "DeviceFrames", "device_rank", "is_device_array", "read_device_frames"]

_DLPACK_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged of the DLPack standard
_ORDERED = 3  # first version of the CUDA array interface that names the stream to wait for


@dataclass(frozen=True)
class DeviceFrames:
    """Frames on a GPU, checked.

    Attributes:
        pointer: address of the first byte.
        count: number of frames N.
        stream: stream whose work must end before the frames are read; None: nothing to wait for.
        unordered: the stream that writes the frames is unknown, so the whole device must be synchronised.
        owner: the caller's object and the view made of it, which keep the memory alive.
    """

    pointer: int
    count: int
    stream: int | None
    unordered: bool
    owner: Any


@dataclass(frozen=True)
class DeviceArray:
    """An output left on the GPU; torch, CuPy, Numba and pycuda read it through `__cuda_array_interface__`.

    Reading the interface after the memory was released raises BackendError.

    Attributes:
        pointer: address of the first element.
        shape: as the graph has it.
        dtype: numpy's type of an element.
        stream: the stream that writes it; a reader of the interface waits for it (see `DeviceOutputs`: not all do).
        owner: keeps the memory from being reused, see `DeviceOutputs`.
        check: raises an error after the release.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int
    owner: Any
    check: Callable[[], None]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.check()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }


def is_device_array(value: Any) -> bool:
    """Whether a value lies on a GPU and can be taken without a host copy (CUDA array interface or DLPack).

    Raises:
        FrameError: the value's own code fails when it is asked.
    """
    if isinstance(value, (np.ndarray, list, tuple)):
        return False
    with _asking(value):
        if hasattr(value, "__cuda_array_interface__"):
            return True
        if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
            return False
        return int(value.__dlpack_device__()[0]) in _DLPACK_CUDA


def device_rank(value: Any) -> int:
    """Number of dimensions of a device array: 3 for one frame, 4 for a batch.

    Raises:
        FrameError: the value's own code fails when it is asked.
    """
    with _asking(value):
        if hasattr(value, "__cuda_array_interface__"):
            return len(value.__cuda_array_interface__["shape"])
        return len(value.shape)


@contextmanager
def _asking(value: Any) -> Iterator[None]:
    """Within the block, errors of a caller's object become errors of the frame."""
    try:
        yield
    except (SaaeError, MemoryError):
        raise
    except Exception as error:  # the value's own code may raise anything
        raise FrameError(
            f"The frames ({type(value).__name__}) cannot be read as an array on the GPU.",
            f"{type(error).__name__}: {error}",
            "give a detached, contiguous uint8 tensor, or a numpy array on the host",
        ) from error


def read_device_frames(value: Any, size: tuple[int, int], api: CudaApi, device: int, stream: int) -> DeviceFrames:
    """Check frames on the GPU and find their address.

    Args:
        value: uint8 H x W x 3 or N x H x W x 3 (RGB), C-contiguous, on `device`.
        size: (H, W) of the graph's input; frames on the GPU are not resized.
        api: CUDA.
        device: the engine's GPU.
        stream: the stream that will read the frames; DLPack producers make it wait for theirs.

    Raises:
        FrameError: another dtype, shape, memory layout, GPU or CUDA context; the message names both sides.
        BackendUnavailableError: a DLPack array, and cuda-core is not installed.
    """
    keep: Any = value
    with _asking(value):
        interface = getattr(value, "__cuda_array_interface__", None)
        ordered = interface is not None and interface.get("version", 0) >= _ORDERED
        view_type = None if ordered or not hasattr(value, "__dlpack__") else _view_type(needed=interface is None)
        producer = None
        if view_type is not None:  # orders the producer's current stream before ours, which older interfaces do not
            view = view_type.from_dlpack(value, stream_ptr=stream)
            pointer, shape, dtype, strides = _from_dlpack(view)
            keep = (value, view)  # an exporter may free or reuse the memory when the view is deleted
        else:
            assert interface is not None
            pointer, shape, dtype, strides = _from_interface(interface)
            producer = interface.get("stream") if ordered else None
            producer = None if producer is None else int(producer)
    _check(shape, dtype, strides, size)
    found = api.pointer_device(pointer) if pointer else None
    if found != device:
        where = "host memory" if found is None else f"GPU {found}"
        raise FrameError(
            f"The frames are on {where}; this engine runs on GPU {device}.",
            "Frames are never copied between devices implicitly.",
            f"copy them to GPU {device} first, or open the engine with device={found}"
            if found is not None
            else "give a numpy array for frames on the host",
        )
    if not api.reachable(pointer, device):
        raise FrameError(
            f"The frames belong to another CUDA context on GPU {device}.",
            "The engine works in the primary context, as torch and CuPy do, and cannot read memory of another.",
            "make the arrays in the primary one; pycuda: import pycuda.autoprimaryctx in place of pycuda.autoinit",
        )
    return DeviceFrames(
        pointer=pointer,
        count=shape[0] if len(shape) == 4 else 1,
        stream=producer,
        unordered=view_type is None and not ordered,
        owner=keep,
    )


_Layout = tuple[int, tuple[int, ...], "np.dtype[Any]", "Sequence[int] | None"]


def _from_interface(interface: dict[str, Any]) -> _Layout:
    shape = tuple(int(side) for side in interface["shape"])
    return int(interface["data"][0]), shape, np.dtype(interface["typestr"]), interface.get("strides")


def _from_dlpack(view: Any) -> _Layout:
    dtype = np.dtype(view.dtype)
    strides = None if view.strides is None else [int(step) * dtype.itemsize for step in view.strides]
    return int(view.ptr), tuple(int(side) for side in view.shape), dtype, strides


def _view_type(needed: bool) -> Any:
    """cuda-core's reader of DLPack; None if it is not installed and not needed."""
    try:
        return importlib.import_module("cuda.core.utils").StridedMemoryView
    except ImportError as error:
        if not needed:
            return None
        raise BackendUnavailableError(
            "Frames are passed through DLPack, which needs cuda-core.",
            "They have no __cuda_array_interface__, which works without it.",
            "pip install cuda-core",
        ) from error


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], strides: Sequence[int] | None, size: tuple[int, int]) -> None:
    if dtype != np.uint8:
        raise FrameError(
            f"The frames on the GPU have dtype {dtype} (shape {shape}); frames are uint8.",
            "The white level of other types is a guess, and a wrong guess shifts every score.",
            "convert them on the GPU, for instance tensor.round().to(torch.uint8) for values 0..255",
        )
    wanted = (size[0], size[1], 3)
    if len(shape) not in (3, 4) or shape[-3:] != wanted or shape[0] < 1:
        raise FrameError(
            f"The frames on the GPU have shape {shape}; this graph takes {wanted} or (N, *{wanted}).",
            "Frames on the GPU are not resized or converted; channels come last.",
            "resize on the GPU before, or give the frames as numpy arrays",
        )
    if strides is not None:
        step = 1
        for side, stride in zip(reversed(shape), reversed(strides), strict=True):
            if side > 1 and stride != step:
                raise FrameError(
                    f"The frames on the GPU are not contiguous: shape {shape}, strides {tuple(strides)} bytes.",
                    "They are a view, cropped, flipped or with channels first.",
                    "make a contiguous copy on the GPU, for instance tensor.contiguous()",
                )
            step *= side
