"""Outputs left on the GPU: a slot's memory, lent to the caller until it is released."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType

from ...errors import BackendError
from ..cuda.arrays import DeviceArray
from .slots import Resources, Slot

__all__ = ["DeviceOutputs", "Lease"]


class Lease:
    """A lent slot; returned once, by `release` or when it is no longer referenced.

    Args:
        slot: the slot.
        resources: its resources.
        back: called with the returned slot.
    """

    def __init__(self, slot: Slot, resources: Resources, back: Callable[[Slot], None]) -> None:
        self._slot, self._resources = slot, resources
        self._finalizer = weakref.finalize(self, back, slot)

    def check(self) -> None:
        """Check that the memory still holds these outputs.

        Raises:
            BackendError: released, or the engine is closed.
        """
        if self._resources.released or not self._finalizer.alive:
            raise BackendError(
                "These outputs are no longer valid.",
                "The engine is closed." if self._resources.released else "They were released.",
                "copy what is needed before that",
            )

    def wait(self) -> None:
        """Wait until the outputs are written."""
        self.check()
        with self._resources.api.on(self._resources.device):
            self._resources.api.wait_host(self._slot.done)
        self._slot.ahead, self._slot.source = False, None

    def hold(self, stream: int) -> None:
        """Make later work of a stream wait until the outputs are written."""
        self.check()
        with self._resources.api.on(self._resources.device):
            self._resources.api.wait(stream, self._slot.done)

    def release(self, stream: int | None) -> None:
        """Return the slot, once; our later work waits for the current work of `stream`."""
        if not self._finalizer.alive:
            return
        resources = self._resources
        try:
            if stream is not None and not resources.released:
                with resources.api.on(resources.device):
                    resources.api.record(self._slot.borrowed, stream)
                    resources.api.wait(resources.compute_stream, self._slot.borrowed)
        finally:
            self._finalizer()


class DeviceOutputs:
    """Outputs that stay on the GPU: `anomaly_map`, `score` and `mask` (uint8 0/1), N x H x W and N.

    They are a slot's memory, lent until `release` (or the end of a `with` block, or collection of this object and the
    arrays). They may still be being written: CuPy and Numba wait for the stream in `__cuda_array_interface__`;
    PyTorch does not, so call `hold(torch.cuda.current_stream().cuda_stream)` or
    `synchronize` first.
    """

    def __init__(self, arrays: Mapping[str, DeviceArray], lease: Lease) -> None:
        self._lease = lease
        self.anomaly_map = arrays["anomaly_map"]
        self.score = arrays["score"]
        self.mask = arrays["mask"]

    def synchronize(self) -> None:
        """Wait until the outputs are written."""
        self._lease.wait()

    def hold(self, stream: int) -> None:
        """Make later work of a stream wait until the outputs are written; the host goes on."""
        self._lease.hold(stream)

    def release(self, stream: int | None = None) -> None:
        """Return the memory; later calls may overwrite it.

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
