"""Outputs left on the GPU: a slot's own memory, lent to the caller until it is given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType

from .cuda import CudaApi
from .device_arrays import DeviceArray
from .trt_slots import Slot

__all__ = ["DeviceOutputs", "Lease"]


class Lease:
    """A slot that is lent out; goes back once, by `release` or when nothing refers to it any more.

    Args:
        slot: what is lent.
        api: CUDA.
        device: number of the GPU.
        compute: the stream that writes the slot's outputs.
        back: takes the slot back.
    """

    def __init__(self, slot: Slot, api: CudaApi, device: int, compute: int, back: Callable[[Slot], None]) -> None:
        self._slot, self._api, self._device, self._compute = slot, api, device, compute
        self._finalizer = weakref.finalize(self, back, slot)

    def wait(self) -> None:
        """Waits until the outputs are written."""
        with self._api.on(self._device):
            self._api.wait_host(self._slot.done)

    def release(self, stream: int | None) -> None:
        """Gives the slot back, once; `stream`: later work of ours waits for what it does now."""
        if not self._finalizer.alive:
            return
        if stream is not None:
            with self._api.on(self._device):
                self._api.record(self._slot.borrowed, stream)
                self._api.wait(self._compute, self._slot.borrowed)
        self._finalizer()


class DeviceOutputs:
    """Outputs that stay on the GPU: `anomaly_map`, `score` and `mask` (uint8 0/1), N x H x W and N.

    They are a slot's own memory, lent until `release` (or the end of a `with` block, or collection of this object and
    of the arrays). Readers of `__cuda_array_interface__` wait for the engine's stream; others call `synchronize`.
    """

    def __init__(self, arrays: Mapping[str, DeviceArray], lease: Lease) -> None:
        self._lease = lease
        self.anomaly_map = arrays["anomaly_map"]
        self.score = arrays["score"]
        self.mask = arrays["mask"]

    def synchronize(self) -> None:
        """Waits until the outputs are written."""
        self._lease.wait()

    def release(self, stream: int | None = None) -> None:
        """Gives the memory back; later calls may overwrite it.

        Args:
            stream: the stream that still reads it; the memory is not written before that work has ended.
        """
        self._lease.release(stream)

    def __enter__(self) -> DeviceOutputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
