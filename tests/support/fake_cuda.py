"""A CUDA and a TensorRT without a GPU: memory, streams, events and graphs that really order the work, and record it.

Work runs as late as CUDA allows, and in any order that streams and events allow: a scheduler picks at random among the
streams that may go on. So a missing event shows as a wrong result, and not only as a missing line in a record.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from saae_runtime.backends.cuda.api import CudaFailure, GpuInfo
from saae_runtime.errors import DeviceError


class FakeCuda:
    """The methods of `CudaApi` over plain memory.

    Attributes:
        log: (method, arguments) of every call, in order.
        fail: method name -> exception to raise, or a list of them (None: go on) used up one by one.
    """

    def __init__(self, *, seed=0, devices=("sm89",), driver=(13, 0), eager=0.0):
        self.log = []
        self.fail = {}
        self.devices = list(devices)
        self.driver = driver
        self.current = 0
        self.capturing = None
        self.foreign = {}  # address -> device, for arrays that others own
        self.blocking = set()  # events that a waiting thread sleeps for
        self.mapped = set()  # addresses of arrays in host memory that the GPU reads
        self.elsewhere = set()  # addresses of arrays in a context that is not the primary one
        self._random = random.Random(seed)
        self._eager = eager
        self._next = 1 << 20
        self._blocks = {}  # address -> (array, kind)
        self._streams = {}
        self._events = defaultdict(lambda: [0, 0])  # [times recorded, times reached]
        self._live_events = set()
        self._graphs = {}
        self._number = 100

    # -- help for tests

    def calls(self, *names):
        """The recorded calls of these methods."""
        return [entry for entry in self.log if entry[0] in names]

    def live(self):
        """What was made and not given back, by kind."""
        kinds = [kind for _, kind in self._blocks.values()]
        return {
            "device": kinds.count("device"),
            "host": kinds.count("host"),
            "streams": len(self._streams),
            "events": len(self._live_events),
            "graphs": len(self._graphs),
        }

    def put(self, array, device=0):
        """Device memory that somebody else owns, with a copy of `array` in it."""
        pointer = self._allocate(array.nbytes, "foreign")
        self.at(pointer, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self.foreign[pointer] = device
        return pointer

    def at(self, pointer, nbytes):
        """The bytes at an address; AssertionError where no live block covers them."""
        for start, (block, _) in self._blocks.items():
            if start <= pointer and pointer + nbytes <= start + len(block):
                return block[pointer - start : pointer - start + nbytes]
        raise AssertionError(f"access to {nbytes} bytes at {pointer}: freed or never allocated")

    def enqueue(self, stream, work, wait=None):
        """Work on a stream; `wait`: (event, times recorded) that must be reached first."""
        assert stream in self._streams, f"stream {stream} is destroyed or unknown"
        if self.capturing == stream:
            assert wait is None
            self._graphs[-1].append(work)
            return
        self._streams[stream].append((wait, work))
        while self._random.random() < self._eager and self._step():
            pass

    # -- CudaApi

    def driver_version(self):
        return self.driver

    def runtime_version(self):
        return (13, 0)

    def check_driver(self, needs_major=None):
        self._note("check_driver", needs_major)
        if self.driver == (0, 0):
            raise DeviceError("No NVIDIA driver is installed or reachable.")

    def device_count(self):
        return len(self.devices)

    def device(self, index):
        self._note("device", index)
        if not 0 <= index < len(self.devices):
            raise DeviceError(f"There is no GPU {index}.")
        return GpuInfo(index, "Fake GPU", self.devices[index], 8 << 30, False)

    @contextmanager
    def on(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def memory_info(self):
        return 4 << 30, 8 << 30

    def malloc(self, nbytes):
        self._note("malloc", nbytes)
        assert self.capturing is None, "allocation while a graph is captured"
        return self._allocate(nbytes, "device")

    def free(self, pointer):
        self._note("free", pointer)
        self._drain()  # as cudaFree does
        del self._blocks[pointer]

    def host_alloc(self, nbytes):
        self._note("host_alloc", nbytes)
        pointer = self._allocate(nbytes, "host")
        return pointer, self._blocks[pointer][0]

    def host_free(self, pointer):
        self._note("host_free", pointer)
        self._drain()
        del self._blocks[pointer]

    def copy_in(self, device, host, nbytes, stream):
        self._copy("copy_in", device, host, nbytes, stream)

    def copy_out(self, host, device, nbytes, stream):
        self._copy("copy_out", host, device, nbytes, stream)

    def copy_within(self, target, source, nbytes, stream):
        self._copy("copy_within", target, source, nbytes, stream)

    def pointer_device(self, pointer):
        for start, (block, kind) in self._blocks.items():
            if start <= pointer < start + len(block):
                return None if kind == "host" else self.foreign.get(start, 0)
        return None

    def reachable(self, pointer, device):
        return pointer not in self.elsewhere

    def stream(self):
        self._note("stream")
        self._number += 1
        self._streams[self._number] = deque()
        return self._number

    def destroy_stream(self, stream):
        self._note("destroy_stream", stream)
        self.synchronize(stream)
        del self._streams[stream]

    def synchronize(self, stream):
        self._note("synchronize", stream)
        assert self.capturing != stream, "a stream is waited for while it is captured"
        while self._streams[stream]:
            assert self._step(), "deadlock: no stream can go on"

    def synchronize_device(self):
        self._note("synchronize_device")
        assert self.capturing is None
        self._drain()

    def event(self, blocking=False):
        self._note("event")
        self._number += 1
        self._live_events.add(self._number)
        if blocking:
            self.blocking.add(self._number)
        return self._number

    def destroy_event(self, event):
        self._note("destroy_event", event)
        self._live_events.remove(event)

    def record(self, event, stream):
        self._note("record", event, stream)
        state = self._events[event]
        state[0] += 1
        times = state[0]
        if stream in self._streams:  # a stream of somebody else's has nothing pending here
            self.enqueue(stream, lambda: self._reach(event, times))
        else:
            self._reach(event, times)

    def wait(self, stream, event):
        self._note("wait", stream, event)
        self.enqueue(stream, lambda: None, wait=(event, self._events[event][0]))

    def wait_host(self, event):
        self._note("wait_host", event)
        times = self._events[event][0]
        while self._events[event][1] < times:
            assert self._step(), "deadlock: the event is never reached"

    def begin_capture(self, stream):
        self._note("begin_capture", stream)
        assert self.capturing is None
        assert not self._streams[stream], "a stream with work of its own is captured"
        self.capturing = stream
        self._graphs[-1] = []

    def end_capture(self, stream):
        assert self.capturing == stream
        self.capturing = None
        work = self._graphs.pop(-1)
        self._note("end_capture", stream)
        self._number += 1
        self._graphs[self._number] = work
        return self._number

    def abandon_capture(self, stream):
        self._note("abandon_capture", stream)
        self.capturing = None
        self._graphs.pop(-1, None)

    def launch(self, graph, stream):
        self._note("launch", graph, stream)
        for work in self._graphs[graph]:
            self.enqueue(stream, work)

    def destroy_graph(self, graph):
        self._note("destroy_graph", graph)
        del self._graphs[graph]

    # -- inside

    def _note(self, name, *arguments):
        self.log.append((name, arguments))
        error = self.fail.get(name)
        if isinstance(error, list):
            error = error.pop(0) if error else None
        if error is not None:
            raise error

    def _allocate(self, nbytes, kind):
        pointer = self._next
        self._next += -(-nbytes // 256) * 256 + 256
        block = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes)())
        block[:] = 0xCD  # what was never written is seen
        self._blocks[pointer] = (block, kind)
        return pointer

    def _copy(self, name, target, source, nbytes, stream):
        self._note(name, target, source, nbytes, stream)
        self.at(target, nbytes), self.at(source, nbytes)

        def work():
            self.at(target, nbytes)[:] = self.at(source, nbytes)

        self.enqueue(stream, work)

    def _reach(self, event, times):
        self._events[event][1] = max(self._events[event][1], times)

    def _step(self):
        ready = [queue for queue in self._streams.values() if queue and self._may_run(queue[0][0])]
        if not ready:
            return False
        _, work = self._random.choice(ready).popleft()
        work()
        return True

    def _may_run(self, wait):
        return wait is None or self._events[wait[0]][1] >= wait[1]

    def _drain(self):
        while self._step():
            pass


def out_of_memory():
    """The error of a malloc that finds no room."""
    return CudaFailure("The GPU is out of memory: 1.0 MiB were asked for.", "", "", "cudaErrorMemoryAllocation")


class FakeArray:
    """An array on the fake GPU, as CuPy, torch or pycuda would hand it over."""

    def __init__(self, cuda, array, *, version=3, stream=None, device=0, **changes):
        self.pointer = cuda.put(array, device)
        interface = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": version,
        }
        if version >= 3:
            interface["stream"] = stream
        self.__cuda_array_interface__ = {**interface, **changes}


# -- TensorRT ---------------------------------------------------------------------------------------------------------


def expected_map(frames):
    """What the fake engine computes: the mean of the channels, from 0 to 1."""
    return (frames.astype(np.float32).sum(-1) / np.float32(765.0)).astype(np.float32)


class FakeContext:
    """An execution context; `execute_async_v3` reads its addresses when it is called, as TensorRT does."""

    def __init__(self, engine):
        self._engine = engine
        self._addresses = {}
        self._memory = (0, 0)
        self.batch = None
        engine.contexts.append(self)
        if engine.capturable is not None:
            self.is_stream_capturable = lambda stream: engine.capturable

    def set_input_shape(self, name, shape):
        height, width = self._engine.size
        if name != "frame" or tuple(shape[1:]) != (height, width, 3) or not 1 <= shape[0] <= self._engine.profile[2]:
            return False
        self.batch = shape[0]
        return True

    def infer_shapes(self):
        return [] if self.batch else ["frame"]

    def update_device_memory_size_for_shapes(self):
        return 1000 * self.batch

    def set_device_memory(self, pointer, size):
        assert size >= 1000 * self.batch
        self._memory = (pointer, size)

    def set_tensor_address(self, name, pointer):
        assert pointer % 256 == 0
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        engine, cuda = self._engine, self._engine.cuda
        cuda.log.append(("execute", (stream,)))
        if engine.refuse or (cuda.capturing == stream and engine.refuse_capture):
            engine.logger.log(engine.logger.ERROR, "the fake engine refuses")
            return False
        height, width = engine.size
        batch, addresses, memory = self.batch, dict(self._addresses), self._memory
        pixels = batch * height * width

        def work():
            scratch = cuda.at(*memory)[: 1000 * batch]
            scratch[:] = batch
            frames = cuda.at(addresses["frame"], pixels * 3).reshape(batch, height, width, 3)
            threshold = cuda.at(addresses["threshold"], 4).view(np.float32)[0]
            values = engine.compute(frames)
            cuda.at(addresses["anomaly_map"], pixels * 4).view(np.float32)[:] = values.reshape(-1)
            cuda.at(addresses["score"], batch * 4).view(np.float32)[:] = values.max((1, 2))
            cuda.at(addresses["mask"], pixels)[:] = (values > threshold).reshape(-1)

        cuda.enqueue(stream, work)
        return True


class FakeEngine:
    """An engine with saae's inputs and outputs; fields change its behaviour.

    `compute`: uint8 N x H x W x 3 to float32 N x H x W.
    """

    def __init__(self, cuda, logger, size, profile, dtypes=None):
        self.cuda, self.logger, self.size, self.profile = cuda, logger, size, profile
        self.contexts = []
        self.capturable = None
        self.refuse = self.refuse_capture = False
        self.compute = expected_map
        height, width = size
        self._tensors = {
            "frame": ((-1, height, width, 3), "uint8", True),
            "threshold": ((1,), "float32", True),
            "anomaly_map": ((-1, height, width), "float32", False),
            "score": ((-1,), "float32", False),
            "mask": ((-1, height, width), "uint8", False),
        }
        for name, dtype in (dtypes or {}).items():
            shape, _, is_input = self._tensors[name]
            self._tensors[name] = (shape, dtype, is_input)
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return "input" if self._tensors[name][2] else "output"

    def get_tensor_shape(self, name):
        return self._tensors[name][0]

    def get_tensor_dtype(self, name):
        return self._tensors[name][1]

    def get_tensor_profile_shape(self, name, index):
        assert (name, index) == ("frame", 0)
        return [(count, *self.size, 3) for count in self.profile]

    def create_execution_context(self, strategy):
        assert strategy == "user"
        return FakeContext(self)


def fake_tensorrt(cuda, *, version="10.3.0", size=(6, 8), profile=(1, 2, 5), change=None, kind=FakeEngine):
    """A module like `tensorrt` that deserializes b"engine" to a FakeEngine, and has no room for b"huge".

    Its list `made` has all engines.

    Args:
        change: called with each engine before it is given out.
        kind: class of the engines.
    """
    made = []

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            if data == b"huge":
                self.logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
                return None
            if data != b"engine":
                self.logger.log(ILogger.ERROR, "the magic tag does not match")
                return None
            engine = kind(cuda, self.logger, size, profile)
            if change is not None:
                change(engine)
            made.append(engine)
            return engine

    return SimpleNamespace(
        __version__=version,
        ILogger=ILogger,
        Runtime=Runtime,
        nptype=lambda kind: np.dtype(kind).type,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        made=made,
    )
