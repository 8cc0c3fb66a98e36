"""Device buffers for ONNX Runtime sessions: allocated once per batch size, bound, and reused by every call.

With CUDA graphs, a set of buffers and its batch size have a recorded graph of their own, since a graph holds addresses.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BindingPool", "Tensor", "plan"]

SHAPES_KEPT = 4
"""Batch sizes whose buffers a binding set keeps: 1, the largest, and two remainders."""
NOT_RECORDED = -1
"""ONNX Runtime's number of a graph that it shall neither record nor replay."""


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

    def __init__(
        self,
        ort: Any,
        session: Any,
        kind: str,
        device: int,
        batch: int,
        size: tuple[int, int],
        graph: int = NOT_RECORDED,
    ) -> None:
        inputs, outputs = plan(batch, size)
        self._session = session
        self._io = session.io_binding()
        self._inputs = [self._allocate(ort, tensor, kind, device) for tensor in inputs]
        self._outputs = [self._allocate(ort, tensor, kind, device) for tensor in outputs]
        for tensor, value in zip(inputs, self._inputs, strict=True):
            self._io.bind_ortvalue_input(tensor.name, value)
        for tensor, value in zip(outputs, self._outputs, strict=True):
            self._io.bind_ortvalue_output(tensor.name, value)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._on_device = kind != "cpu"
        self._threshold = math.nan

    @staticmethod
    def _allocate(ort: Any, tensor: Tensor, kind: str, device: int) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), tensor.dtype, kind, device)

    def run(
        self, frames: NDArray[np.uint8], threshold: NDArray[np.float32], alone: threading.Lock | None = None
    ) -> list[NDArray[Any]]:
        """Copy in, compute (one call at a time if there is a lock), copy out."""
        self._inputs[0].update_inplace(frames)
        if threshold[0] != self._threshold:
            self._inputs[1].update_inplace(threshold)
            self._threshold = float(threshold[0])
        self._io.synchronize_inputs()
        if alone is None:
            self._session.run_with_iobinding(self._io, self._options)
        else:
            with alone:
                self._session.run_with_iobinding(self._io, self._options)
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
        graphs: whether the session was opened to record CUDA graphs. The first SHAPES_KEPT batch sizes then have one in
            each set; only the copies of several calls overlap, since such a session computes one call at a time.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        kind: str,
        device: int,
        size: tuple[int, int],
        sets: int,
        graphs: bool = False,
    ) -> None:
        self._make = lambda batch, graph: _Binding(ort, session, kind, device, batch, size, graph)
        # Last in, first out: one thread alone keeps using one warm set.
        self._free: queue.LifoQueue[OrderedDict[int, _Binding]] = queue.LifoQueue()
        self._sets, self._size = sets, size
        for _ in range(sets):
            self._free.put(OrderedDict())
        self._alone = threading.Lock() if graphs else None
        self._recording = threading.Lock()
        self._recorded: set[int] = set()
        self._numbers: Iterator[int] = itertools.count(1)

    def run(self, frames: NDArray[np.uint8], threshold: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Run uint8 N x H x W x 3; give the three outputs as host arrays owned by the caller."""
        batch = len(frames)
        if self._alone is not None and batch not in self._recorded:
            self._record(batch, threshold)
        bindings = self._free.get()
        try:
            if batch not in bindings:
                self._keep(bindings, batch, NOT_RECORDED)
            bindings.move_to_end(batch)
            return bindings[batch].run(frames, threshold, self._alone)
        finally:
            self._free.put(bindings)

    def _keep(self, bindings: OrderedDict[int, _Binding], batch: int, graph: int) -> None:
        """Make buffers in place of the longest unused ones. A recorded graph holds addresses: its own stay."""
        spare = [size for size in bindings if size not in self._recorded]
        if len(bindings) >= SHAPES_KEPT and spare:
            del bindings[spare[0]]
        bindings[batch] = self._make(batch, graph)

    def _record(self, batch: int, threshold: NDArray[np.float32]) -> None:
        """Record this batch size in every set, while no other call touches the GPU: recording forbids their copies.

        A graph stays with the session for good. So only the first few sizes have one.
        """
        with self._recording:
            if batch in self._recorded or len(self._recorded) >= SHAPES_KEPT:
                return
            all_sets = [self._free.get() for _ in range(self._sets)]
            try:
                blank = np.zeros((batch, *self._size, 3), np.uint8)
                for bindings in all_sets:
                    self._keep(bindings, batch, next(self._numbers))
                    bindings[batch].run(blank, threshold, self._alone)
                self._recorded.add(batch)
            finally:
                for bindings in all_sets:
                    self._free.put(bindings)
