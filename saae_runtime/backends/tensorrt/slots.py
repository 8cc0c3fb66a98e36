"""Memory, events and execution contexts of the batches in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SaaeError
from ..cuda.api import CudaApi
from .kernels import KernelCache
from .library import TensorInfo

__all__ = ["ALIGNMENT", "BufferPlan", "Plan", "Resources", "Slot", "capacity_for"]

ALIGNMENT = 256
"""Alignment in bytes, which TensorRT needs and cudaMalloc gives."""


def capacity_for(batch: int, largest: int) -> int:
    """Capacity for `batch` frames: the next power of two, to limit reallocations, up to `largest`."""
    return min(largest, 1 << (batch - 1).bit_length())


@dataclass(frozen=True)
class BufferPlan:
    """Layout of the tensors in one block of memory for `capacity` frames.

    Attributes:
        capacity: most frames N.
        offsets: bytes from the start of the block, multiples of ALIGNMENT.
        total: size of the block in bytes.
    """

    capacity: int
    tensors: tuple[TensorInfo, ...]
    offsets: dict[str, int]
    total: int

    @classmethod
    def make(cls, tensors: Sequence[TensorInfo], capacity: int) -> BufferPlan:
        """Lay the tensors out one after the other."""
        offsets, end = {}, 0
        for tensor in tensors:
            offsets[tensor.name] = end
            size = _nbytes(tensor, capacity)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(capacity, tuple(tensors), offsets, end)

    def tensor(self, name: str) -> TensorInfo:
        """The tensor of that name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def nbytes(self, name: str, batch: int) -> int:
        """Bytes that a tensor takes for a batch."""
        return _nbytes(self.tensor(name), batch)

    def view(self, block: NDArray[np.uint8], name: str, batch: int) -> NDArray[Any]:
        """A tensor of `batch` frames in a block, as an array of its type and shape."""
        tensor, start = self.tensor(name), self.offsets[name]
        flat = block[start : start + _nbytes(tensor, batch)].view(tensor.dtype)
        return flat.reshape(_shape(tensor, batch))


def _shape(tensor: TensorInfo, batch: int) -> tuple[int, ...]:
    return tuple(batch if side == -1 else side for side in tensor.shape)


def _nbytes(tensor: TensorInfo, batch: int) -> int:
    return int(np.prod(_shape(tensor, batch), dtype=np.int64)) * tensor.dtype.itemsize


@dataclass
class Plan:
    """One execution context at one batch size of one slot, and its CUDA graph once captured.

    TensorRT's advice is one context for each captured graph; all share one block of activation memory, which is safe
    because they run one after the other on one stream.

    Attributes:
        context: the execution context, its shapes and addresses set.
        batch: the batch size.
        arrays: the tensors in pinned memory at this batch size.
        graph: captured launches, or None.
        runs: number of runs since the context was changed.
        capturable: whether a graph may be captured.
        refusals: how often a capture failed.
    """

    context: Any
    batch: int = 0
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    graph: int | None = None
    runs: int = 0
    capturable: bool = True
    refusals: int = 0


@dataclass
class Slot:
    """Room for one batch in flight.

    Attributes:
        copied, computed, done: events after the copy in, the computation and the copy out.
        borrowed: event for other streams (a producer's or a reader's).
        threshold: T on the device; None before the first copy.
        ahead: whether the host went on without waiting for the work in this slot (outputs left on the GPU).
        source: inputs of that work, kept alive until it has ended.
    """

    copied: int
    computed: int
    done: int
    borrowed: int
    layout: BufferPlan | None = None
    device: int = 0
    host: int = 0
    block: NDArray[np.uint8] | None = None
    threshold: float | None = None
    ahead: bool = False
    source: Any = None
    plans: dict[int, Plan] = field(default_factory=dict)
    loose: Plan | None = None

    def address(self, name: str) -> int:
        """Device address of a tensor."""
        assert self.layout is not None
        return self.device + self.layout.offsets[name]

    def host_address(self, name: str) -> int:
        """Address of a tensor in pinned memory."""
        assert self.layout is not None
        return self.host + self.layout.offsets[name]

    def arrays(self, batch: int) -> dict[str, NDArray[Any]]:
        """The tensors of `batch` frames in pinned memory, as arrays."""
        assert self.layout is not None
        assert self.block is not None
        return {tensor.name: self.layout.view(self.block, tensor.name, batch) for tensor in self.layout.tensors}

    def all_plans(self) -> list[Plan]:
        """Every execution context of the slot."""
        return [*self.plans.values(), *([] if self.loose is None else [self.loose])]


class Resources:
    """Everything on the GPU that one backend owns; `release` may run at close, at collection or at interpreter exit.

    It has no reference to the backend, so that a finalizer can hold it without keeping the backend alive.
    """

    def __init__(self, api: CudaApi, device: int, engine: Any, tensors: Sequence[TensorInfo]) -> None:
        self.api = api
        self.device = device
        self.engine = engine
        self.kernels: KernelCache | None = None
        self.tensors = tuple(tensors)
        self.slots: list[Slot] = []
        self.workspace = 0
        self.workspace_size = 0
        self.released = False
        self._streams: list[int] = []
        try:
            with api.on(device):
                for _ in range(4):
                    self._streams.append(api.stream())
            # Captured on a separate stream: others may wait for the computing one (readers of outputs, other
            # threads that give outputs back), and a wait that falls into a capture spoils it.
            self.copy_in_stream, self.compute_stream, self.copy_out_stream, self.capture_stream = self._streams
        except BaseException:
            self.release()
            raise

    def add_slot(self) -> Slot:
        """A slot without memory yet."""
        events: list[int] = []
        try:
            with self.api.on(self.device):
                for _ in range(4):
                    events.append(self.api.event(blocking=len(events) == 0))
        except BaseException:
            self._each(self.api.destroy_event, events)
            raise
        done, copied, computed, borrowed = events  # the host only waits for `done`
        slot = Slot(copied, computed, done, borrowed)
        self.slots.append(slot)
        return slot

    def settle(self, slot: Slot) -> None:
        """Wait for unfinished work, so that the slot's memory may be written again."""
        if slot.ahead:
            with self.api.on(self.device):
                self.api.wait_host(slot.done)
            slot.ahead, slot.source = False, None

    def reserve(self, slot: Slot, capacity: int) -> None:
        """Give an idle slot memory for `capacity` frames; the old memory is released afterwards.

        Raises:
            DeviceError: out of memory; the slot keeps what it had.
        """
        layout = BufferPlan.make(self.tensors, capacity)
        with self.api.on(self.device):
            device = self.api.malloc(layout.total)
            try:
                host, block = self.api.host_alloc(layout.total)
            except BaseException:
                self.api.free(device)
                raise
            self._free_memory(slot)
            slot.layout, slot.device, slot.host, slot.block = layout, device, host, block
            slot.threshold = None

    def grow_workspace(self, size: int, give: Callable[[Any, int, int], None]) -> None:
        """Make the shared activation memory at least `size` bytes; graphs that knew the old address are dropped.

        Args:
            size: bytes that a context asks for.
            give: sets the address and size of a context's memory.
        """
        if self.workspace and size <= self.workspace_size:
            return
        size = max(size, ALIGNMENT)
        with self.api.on(self.device):
            fresh = self.api.malloc(size)
            if self.workspace:
                self.api.synchronize(self.compute_stream)  # running work still uses the old memory
            old, self.workspace, self.workspace_size = self.workspace, fresh, size
            for slot in self.slots:
                for plan in slot.all_plans():
                    self.drop_graph(plan)
                    give(plan.context, fresh, size)
                    plan.runs = 0
            if old:
                self.api.free(old)

    def drop_graph(self, plan: Plan) -> None:
        """Forget a captured graph."""
        if plan.graph is not None:
            graph, plan.graph = plan.graph, None
            self.api.destroy_graph(graph)

    def synchronize(self) -> None:
        """Wait for everything in flight."""
        with self.api.on(self.device):
            for stream in self._streams:
                self.api.synchronize(stream)

    def release(self) -> None:
        """Release everything in the order that CUDA needs; ignore errors (the driver may be shut down already)."""
        if self.released:
            return
        self.released = True
        with suppress(SaaeError):
            self._release()

    def _release(self) -> None:
        with self.api.on(self.device):
            self._each(self.api.synchronize, self._streams)
            if self.kernels is not None:
                with suppress(Exception):  # also the library's errors: the rest must still be released
                    self.kernels.save()
            for slot in self.slots:
                slot.source = None
                with suppress(SaaeError):
                    self._free_memory(slot)
                self._each(self.api.destroy_event, [slot.copied, slot.computed, slot.done, slot.borrowed])
            if self.workspace:
                self._each(self.api.free, [self.workspace])
            self._each(self.api.destroy_stream, self._streams)
            self.slots.clear()
            self._streams.clear()
            self.workspace = self.workspace_size = 0
            if self.kernels is not None:
                self.kernels.close()
            self.engine = None

    def _free_memory(self, slot: Slot) -> None:
        for plan in slot.all_plans():
            with suppress(SaaeError):
                self.drop_graph(plan)
            plan.arrays.clear()
        slot.plans.clear()
        slot.loose = None
        slot.block = None
        device, host = slot.device, slot.host
        slot.device = slot.host = 0
        if device:
            self._each(self.api.free, [device])
        if host:
            self._each(self.api.host_free, [host])

    @staticmethod
    def _each(act: Callable[[int], None], items: Sequence[int]) -> None:
        for item in items:
            with suppress(SaaeError):
                act(item)
