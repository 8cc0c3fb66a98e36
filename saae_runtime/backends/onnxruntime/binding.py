"""Device buffers for ONNX Runtime sessions: allocated once per batch size, bound, and reused by every call."""

from __future__ import annotations

import math
import queue
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BindingPool", "Tensor", "plan"]

SHAPES_KEPT = 4
"""Batch sizes whose buffers a binding set keeps: 1, the largest, and two remainders."""


@dataclass(frozen=True)
class Tensor:
    """Name, shape and dtype of one bound buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


def plan(batch: int, size: tuple[int, int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Input and output buffers of the fused graph for `batch` frames of `size` = (height, width)."""
    height, width = size
    inputs = (Tensor("frame", (batch, height, width, 3), np.uint8), Tensor("threshold", (1,), np.float32))
    outputs = (
        Tensor("anomaly_map", (batch, height, width), np.float32),
        Tensor("score", (batch,), np.float32),
        Tensor("mask", (batch, height, width), np.uint8),
    )
    return inputs, outputs


class _Binding:
    """Buffers of one batch size, bound to a session."""

    def __init__(self, ort: Any, session: Any, kind: str, device: int, batch: int, size: tuple[int, int]) -> None:
        inputs, outputs = plan(batch, size)
        self._session = session
        self._io = session.io_binding()
        self._inputs = [self._allocate(ort, tensor, kind, device) for tensor in inputs]
        self._outputs = [self._allocate(ort, tensor, kind, device) for tensor in outputs]
        for tensor, value in zip(inputs, self._inputs, strict=True):
            self._io.bind_ortvalue_input(tensor.name, value)
        for tensor, value in zip(outputs, self._outputs, strict=True):
            self._io.bind_ortvalue_output(tensor.name, value)
        self._on_device = kind != "cpu"
        self._threshold = math.nan

    @staticmethod
    def _allocate(ort: Any, tensor: Tensor, kind: str, device: int) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), tensor.dtype, kind, device)

    def run(self, frames: NDArray[np.uint8], threshold: NDArray[np.float32]) -> list[NDArray[Any]]:
        self._inputs[0].update_inplace(frames)
        if threshold[0] != self._threshold:
            self._inputs[1].update_inplace(threshold)
            self._threshold = float(threshold[0])
        self._io.synchronize_inputs()
        self._session.run_with_iobinding(self._io)
        self._io.synchronize_outputs()
        # numpy() copies off a device, but may show the host buffer itself, which belongs to the next call.
        return [value.numpy() if self._on_device else np.array(value.numpy()) for value in self._outputs]


class BindingPool:
    """Sets of bound buffers; a call takes a free set, or waits for one, so that calls of several threads overlap.

    Args:
        ort: the onnxruntime module.
        session: an InferenceSession of the fused graph.
        kind: device of the buffers, `cuda` or `cpu`.
        device: its number.
        size: (height, width) of the graph's frame.
        sets: number of sets.
    """

    def __init__(self, ort: Any, session: Any, kind: str, device: int, size: tuple[int, int], sets: int) -> None:
        self._make = lambda batch: _Binding(ort, session, kind, device, batch, size)
        # Last in, first out: one thread alone keeps using one warm set.
        self._free: queue.LifoQueue[OrderedDict[int, _Binding]] = queue.LifoQueue()
        for _ in range(sets):
            self._free.put(OrderedDict())

    def run(self, frames: NDArray[np.uint8], threshold: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Run uint8 N x H x W x 3; give the three outputs as host arrays owned by the caller."""
        bindings = self._free.get()
        try:
            batch = len(frames)
            if batch not in bindings:
                if len(bindings) >= SHAPES_KEPT:
                    bindings.popitem(last=False)
                bindings[batch] = self._make(batch)
            bindings.move_to_end(batch)
            return bindings[batch].run(frames, threshold)
        finally:
            self._free.put(bindings)
