"""Runs a TensorRT engine: batches in flight on three streams, launches captured in CUDA graphs, nothing allocated."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, DeviceError, EngineIncompatibleError, FrameError, SaaeError
from ..base import Backend, BackendOptions, RawOutputs, Ticket
from ..cuda.api import CudaApi, GpuInfo
from ..cuda.arrays import DeviceArray, DeviceFrames, is_device_array, read_device_frames
from .kernels import KernelCache
from .library import TrtLibrary
from .outputs import DeviceOutputs, Lease
from .slots import Plan, Resources, Slot, capacity_for

__all__ = ["TensorRTBackend"]

_SLOTS = 3
_CAPTURES = 3  # attempts per batch size of a slot: the cause of a failure may pass (another thread, another library)
_SHAPES = 8
"""Batch sizes with their own context and CUDA graph in each slot; further ones share one context."""

_INPUTS = {"frame": np.uint8, "threshold": np.float32}
_OUTPUTS = {"anomaly_map": np.float32, "score": np.float32, "mask": np.uint8}


@dataclass(frozen=True)
class _Running:
    """A batch in flight: its slot, its requested size, and what must stay alive meanwhile."""

    slot: Slot
    plan: Plan
    count: int
    source: Any


@dataclass(frozen=True)
class _Waiting:
    """A batch that found no free slot; it runs when it is collected, so that no thread waits for another's slots."""

    frames: Any
    threshold: float


class TensorRTBackend(Backend):
    """One engine on one GPU; see `Backend`.

    Copy in, computation and copy out each have a stream, so they overlap between batches. Computations run one after
    the other, so one block of activation memory is enough. A batch size gets memory, an execution context and a CUDA
    graph in its first two calls; later calls allocate nothing on the device.

    Args:
        name: the backend's name.
        library: the loaded flavour of TensorRT.
        engine: the deserialized engine.
        api: CUDA.
        gpu: the device it is on.
        precision: of the engine, whose thresholds apply.
        frame_size: (H, W) of the bundle's frames.
        options: see `BackendOptions`.
        label: the engine's file name, for messages.
        kernels: file for kernels that are compiled at run time (TensorRT for RTX); None keeps them in memory only.

    Raises:
        EngineIncompatibleError: the engine has other inputs or outputs than saae's graph.
        DeviceError: the GPU has no memory left, or the first run fails.
    """

    def __init__(
        self,
        *,
        name: str,
        library: TrtLibrary,
        engine: Any,
        api: CudaApi,
        gpu: GpuInfo,
        precision: str,
        frame_size: tuple[int, int],
        options: BackendOptions,
        label: str,
        kernels: Path | None = None,
    ) -> None:
        self.name = name
        self.precision = precision
        self.frame_size = frame_size
        self._library, self._api, self._gpu, self._label = library, api, gpu, label
        tensors = library.tensors(engine)
        self._check_tensors(tensors)
        low, _, high = library.batch_range(engine, "frame")
        self._low = low
        self._high = high if options.max_batch is None else max(low, min(high, options.max_batch))
        self.max_batch = self._high
        self.slots = options.slots or _SLOTS
        self.cuda_graph = options.cuda_graph
        self._warned = False
        self.description = f"{library.title}, {label}, GPU {gpu.index} {gpu.name} ({gpu.sm})"
        self._resources = Resources(api, gpu.index, engine, tensors)
        self._close = weakref.finalize(self, self._resources.release)
        self._free: deque[Slot] = deque()
        self._made = 0
        self._pool_lock = threading.RLock()  # a collected `Lease` gives its slot back, on whatever thread
        self._enqueue_lock = threading.RLock()
        self._spare_lock = threading.Lock()
        self._spare: Slot | None = None
        try:
            with api.on(gpu.index):
                self._kernels = self._resources.kernels = KernelCache(library, engine, kernels)
            if options.warm_up:  # prepare an announced largest batch, so that nothing is allocated later
                self.prepare((self._low,) if options.max_batch is None else (self._low, self._high))
        except BaseException:
            self.close()
            raise

    # -- Backend ----------------------------------------------------------------------------------------------------

    def infer(self, frames: Any, threshold: float) -> RawOutputs:
        """Run a batch; frames may also lie on the GPU (see `submit`)."""
        self._require_open()
        slot = self._take()
        if slot is not None:
            return self.collect(self._started(slot, frames, threshold, self._give_back))
        with self._spare_lock:  # every slot is in flight: an extra one is kept for such calls, which always end
            if self._spare is None:
                self._spare = self._resources.add_slot()
            return self.collect(self._started(self._spare, frames, threshold, _nothing))

    def submit(self, frames: Any, threshold: float) -> Ticket:
        """Start a batch and return; with all slots in flight the batch runs when it is collected.

        Args:
            frames: uint8 N x H x W x 3 on the host, or the same on this GPU as an object with
                `__cuda_array_interface__` or DLPack: taken without a host copy. Not changed before `collect`.
            threshold: pixel threshold T of the mask.

        Raises:
            FrameError: a shape, dtype or device that the engine does not take.
            DeviceError: the GPU failed.
        """
        self._require_open()
        slot = self._take()
        if slot is None:
            return Ticket(_Waiting(frames, threshold))
        return self._started(slot, frames, threshold, self._give_back)

    def collect(self, ticket: Ticket) -> RawOutputs:
        """Wait for a batch and copy its outputs out of the pinned memory."""
        work, ticket.payload = ticket.payload, None
        if isinstance(work, _Waiting):
            return self.infer(work.frames, work.threshold)
        if not isinstance(work, _Running):
            raise BackendError("A ticket was collected twice.", "", "collect each ticket once, in order")
        try:
            self._require_open()
            with self._api.on(self._gpu.index):
                self._api.wait_host(work.slot.done)
            arrays, count = work.plan.arrays, work.count
            return RawOutputs(
                anomaly_map=arrays["anomaly_map"][:count].copy(),
                score=arrays["score"][:count].copy(),
                mask=arrays["mask"][:count] != 0,
            )
        finally:
            if work.slot is not self._spare:
                self._give_back(work.slot)

    def close(self) -> None:
        self._close()

    # -- beyond Backend ----------------------------------------------------------------------------------------------

    def infer_on_device(self, frames: Any, threshold: float) -> DeviceOutputs:
        """Run a batch and leave the outputs on the GPU; return without waiting for it.

        Args:
            frames: as `submit` takes them.
            threshold: pixel threshold T of the mask.

        Raises:
            BackendError: all slots are in flight or lent; release outputs first.
            FrameError, DeviceError: as `submit`.
        """
        self._require_open()
        slot = self._take()
        if slot is None:
            raise BackendError(
                f"All {self.slots} slots are in use.",
                "Outputs left on the GPU keep their slot until they are released.",
                "release() earlier outputs, or open the engine with more slots",
            )
        work: _Running = self._started(slot, frames, threshold, self._give_back, stay=True).payload
        layout, resources = slot.layout, self._resources
        assert layout is not None
        lease = Lease(slot, resources, self._give_back)
        arrays = {}
        for tensor in layout.tensors:
            if tensor.name in _OUTPUTS:
                shape = (work.count, *tensor.shape[1:])
                arrays[tensor.name] = DeviceArray(
                    slot.address(tensor.name), shape, tensor.dtype, resources.compute_stream, lease, lease.check
                )
        return DeviceOutputs(arrays, lease)

    def prepare(self, batches: tuple[int, ...]) -> None:
        """Make memory, contexts and CUDA graphs for these batch sizes in every slot in advance."""
        height, width = self.frame_size
        slots = list(iter(self._take, None))
        try:
            for batch in sorted(batches, reverse=True):  # the largest first: smaller ones fit its memory
                frames = np.zeros((batch, height, width, 3), np.uint8)
                for slot in slots:
                    for _ in range(1 + _CAPTURES if self.cuda_graph else 1):
                        if slot.plans.get(batch) is not None and slot.plans[batch].graph is not None:
                            break
                        self._start(slot, frames, 0.0)
                        with self._api.on(self._gpu.index):
                            self._api.wait_host(slot.done)
            with self._enqueue_lock, self._api.on(self._gpu.index):
                self._kernels.save()  # now, because a process on a line may be killed instead of closed
        finally:
            for slot in slots:
                self._give_back(slot)

    # -- slots ------------------------------------------------------------------------------------------------------

    def _take(self) -> Slot | None:
        with self._pool_lock:
            if self._free:
                return self._free.popleft()
            if self._made >= self.slots:
                return None
            self._made += 1
        try:
            return self._resources.add_slot()
        except BaseException:
            with self._pool_lock:
                self._made -= 1
            raise

    def _give_back(self, slot: Slot) -> None:
        with self._pool_lock:
            if slot.ahead:  # its work may still run, so use others first
                self._free.append(slot)
            else:
                self._free.appendleft(slot)  # the last used one is warm

    # -- one batch --------------------------------------------------------------------------------------------------

    def _started(
        self, slot: Slot, frames: Any, threshold: float, give_back: Callable[[Slot], None], stay: bool = False
    ) -> Ticket:
        try:
            return Ticket(self._start(slot, frames, threshold, stay))
        except BaseException:
            give_back(slot)
            raise

    def _start(self, slot: Slot, frames: Any, threshold: float, stay: bool = False) -> _Running:
        resources = self._resources
        resources.settle(slot)
        source = self._source(frames)
        count = source.count if isinstance(source, DeviceFrames) else len(source)
        self._check_batch(count)
        batch = max(count, self._low)
        if slot.layout is None or slot.layout.capacity < batch:
            with self._enqueue_lock:
                resources.reserve(slot, capacity_for(batch, self._high))
        plan = slot.plans.get(batch)
        if plan is None:
            with self._enqueue_lock, self._api.on(self._gpu.index):
                plan = self._plan(slot, batch)
        if not isinstance(source, DeviceFrames):
            plan.arrays["frame"][:count] = source  # outside the lock: other threads launch meanwhile
        with self._enqueue_lock, self._api.on(self._gpu.index):
            try:
                self._copy_in(slot, plan, source, threshold)
                self._compute(plan)
                if stay:
                    self._api.record(slot.done, resources.compute_stream)
                    slot.ahead, slot.source = True, source
                else:
                    self._copy_out(slot, plan)
            except BaseException:
                # Work may be running in this slot's memory. Wait only under the lock, because a stream that another
                # thread captures must not be waited for. Before this point no work was started.
                with suppress(SaaeError):
                    resources.synchronize()
                raise
        return _Running(slot, plan, count, source)

    def _source(self, frames: Any) -> NDArray[np.uint8] | DeviceFrames:
        if is_device_array(frames):
            stream = self._resources.copy_in_stream
            with self._api.on(self._gpu.index):
                return read_device_frames(frames, self.frame_size, self._api, self._gpu.index, stream)
        wanted = (*self.frame_size, 3)
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[1:] != wanted:
            found = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise FrameError(f"The engine takes uint8 (N, {', '.join(map(str, wanted))}); it was given {found}.")
        return frames

    def _check_batch(self, count: int) -> None:
        if not 1 <= count <= self._high:
            raise FrameError(
                f"A batch of {count} frames; this engine takes 1 to {self._high}.",
                f"{self._label} was built for batches up to {self._high}." if count else "The batch is empty.",
                f"split the batch, or rebuild: saae-export engine BUNDLE --max-batch {count}" if count else "",
            )

    def _copy_in(self, slot: Slot, plan: Plan, source: NDArray[np.uint8] | DeviceFrames, threshold: float) -> None:
        api, stream, arrays = self._api, self._resources.copy_in_stream, plan.arrays
        if isinstance(source, DeviceFrames):
            if source.unordered:
                api.synchronize_device()
            if source.stream is not None:
                api.record(slot.borrowed, source.stream)
                api.wait(stream, slot.borrowed)
            api.copy_within(slot.address("frame"), source.pointer, arrays["frame"][: source.count].nbytes, stream)
        else:
            api.copy_in(slot.address("frame"), slot.host_address("frame"), arrays["frame"].nbytes, stream)
        if slot.threshold != threshold:
            slot.threshold = None
            arrays["threshold"][0] = threshold
            api.copy_in(slot.address("threshold"), slot.host_address("threshold"), arrays["threshold"].nbytes, stream)
            slot.threshold = threshold
        api.record(slot.copied, stream)
        api.wait(self._resources.compute_stream, slot.copied)

    def _copy_out(self, slot: Slot, plan: Plan) -> None:
        api, stream = self._api, self._resources.copy_out_stream
        api.record(slot.computed, self._resources.compute_stream)
        api.wait(stream, slot.computed)
        for name in _OUTPUTS:
            api.copy_out(slot.host_address(name), slot.address(name), plan.arrays[name].nbytes, stream)
        api.record(slot.done, stream)

    # -- contexts and graphs ----------------------------------------------------------------------------------------

    def _plan(self, slot: Slot, batch: int) -> Plan:
        plan = slot.plans.get(batch)
        if plan is not None:
            return plan
        if len(slot.plans) < _SHAPES:
            plan = slot.plans[batch] = self._new_plan(slot, batch)
            return plan
        if slot.loose is None or slot.loose.batch != batch:
            if slot.loose is None:
                slot.loose = self._new_plan(slot, batch)
                slot.loose.capturable = False
            else:
                self._set_batch(slot, slot.loose, batch)
        return slot.loose

    def _new_plan(self, slot: Slot, batch: int) -> Plan:
        plan = Plan(self._kernels.context(self._resources.engine))
        self._set_batch(slot, plan, batch)
        for tensor in self._resources.tensors:
            if not plan.context.set_tensor_address(tensor.name, slot.address(tensor.name)):
                raise self._failed(f"It takes no address for {tensor.name}.")
        return plan

    def _set_batch(self, slot: Slot, plan: Plan, batch: int) -> None:
        plan.batch = 0  # until all is set
        for tensor in self._resources.tensors:
            if tensor.is_input and -1 in tensor.shape:
                shape = tuple(batch if side == -1 else side for side in tensor.shape)
                if not plan.context.set_input_shape(tensor.name, shape):
                    raise self._failed(f"It refuses {tensor.name} of shape {shape}.")
        try:
            missing = plan.context.infer_shapes()
        except RuntimeError as error:
            raise self._failed(f"It cannot tell its shapes: {error}.") from error
        if missing:
            raise self._failed(f"It cannot tell the shapes of {', '.join(missing)}.")
        resources, give = self._resources, self._library.give_memory
        size = int(plan.context.update_device_memory_size_for_shapes())
        if size <= 0 and self._library.needs_memory(resources.engine):
            raise self._failed(f"It cannot tell the memory that a batch of {batch} needs.")
        resources.grow_workspace(size, give)
        give(plan.context, resources.workspace, resources.workspace_size)
        plan.arrays = slot.arrays(batch)
        plan.batch, plan.runs = batch, 0

    def _compute(self, plan: Plan) -> None:
        stream = self._resources.compute_stream
        if plan.graph is not None:
            self._api.launch(plan.graph, stream)
            return
        if self.cuda_graph and plan.capturable and plan.runs:  # the first run does TensorRT's lazy work
            plan.graph = self._capture(plan)
            if plan.graph is not None:
                self._api.launch(plan.graph, stream)
                return
        if not plan.context.execute_async_v3(stream):
            raise self._failed("It did not start.")
        plan.runs += 1

    def _capture(self, plan: Plan) -> int | None:
        api, stream = self._api, self._resources.capture_stream
        capturable = getattr(plan.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(stream):
            return self._without_graph(plan, "the engine says that it cannot be captured", for_good=True)
        try:
            api.begin_capture(stream)
        except DeviceError as error:
            return self._without_graph(plan, error.why)
        try:
            started = plan.context.execute_async_v3(stream)
        except BaseException:
            api.abandon_capture(stream)
            raise
        if not started:
            api.abandon_capture(stream)
            return self._without_graph(plan, "; ".join(self._library.take_messages()) or "the engine did not start")
        try:
            return api.end_capture(stream)
        except DeviceError as error:
            return self._without_graph(plan, error.why)

    def _without_graph(self, plan: Plan, reason: str, for_good: bool = False) -> int | None:
        """Return None: this launch runs without a graph. Capture is tried a few more times.

        Args:
            plan: what was to be captured.
            reason: why it was not.
            for_good: whether the engine can never be captured.
        """
        plan.refusals += 1
        if not for_good and plan.refusals < _CAPTURES:
            return None
        plan.capturable = False
        if for_good:
            self.cuda_graph = False
        if self._warned:
            return None
        self._warned = True
        warnings.warn(
            f"{self._label} runs without a CUDA graph: capture was refused ({reason}). Results are the same; "
            "each launch costs more CPU time. cuda_graph=False silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    # -- checks -----------------------------------------------------------------------------------------------------

    def _check_tensors(self, tensors: Any) -> None:
        height, width = self.frame_size
        shapes = {
            "frame": (-1, height, width, 3),
            "threshold": (1,),
            "anomaly_map": (-1, height, width),
            "score": (-1,),
            "mask": (-1, height, width),
        }
        wanted = {name: (np.dtype(kind), shapes[name]) for name, kind in {**_INPUTS, **_OUTPUTS}.items()}
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        for name, (dtype, shape) in wanted.items():
            if name not in found or found[name][0] != dtype or not _fits(found[name][1], shape):
                have = f"{found[name][0]} {found[name][1]}" if name in found else "nothing"
                raise EngineIncompatibleError(
                    f"{self._label} is not an engine of this bundle: {name} should be {dtype} {shape}, it is {have}.",
                    "It was built from another graph.",
                    "rebuild it from this bundle: saae-export engine BUNDLE",
                )

    def _require_open(self) -> None:
        if self._resources.released:
            raise BackendError("The engine is closed.", "", "open a new one")

    def _failed(self, what: str) -> DeviceError:
        said = "; ".join(self._library.take_messages())
        return DeviceError(
            f"{self._label} failed on GPU {self._gpu.index}. {what}",
            f"{self._library.title} said: {said}" if said else "",
            "if this repeats, close the engine and restart the process: after some errors a GPU context is lost",
        )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is the wanted one; a fixed batch is accepted for a free one."""
    return len(found) == len(wanted) and all(want in (have, -1) for have, want in zip(found, wanted, strict=True))


def _nothing(_: Slot) -> None:
    """Do nothing: there is no slot to give back."""
