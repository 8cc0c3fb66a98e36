"""All CUDA calls of saae, through NVIDIA's cuda-python, in a device's primary context."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendUnavailableError, DeviceError
from .jetson import find_jetson

__all__ = ["CudaApi", "CudaFailure", "GpuInfo", "cuda_install_hint"]


_UNREACHABLE = "unreachable"
_DOCTOR = "saae-export doctor says what is missing here"


class CudaFailure(DeviceError):
    """A CUDA call that failed; `code` is CUDA's own name of the error, such as `cudaErrorMemoryAllocation`."""

    def __init__(self, what: str, why: str = "", cure: str = "", code: str = "") -> None:
        super().__init__(what, why, cure)
        self.code = code


@dataclass(frozen=True)
class GpuInfo:
    """One GPU: its name, generation (`sm89`), memory in bytes and whether it shares the host's memory (Jetson)."""

    index: int
    name: str
    sm: str
    memory: int
    integrated: bool


def cuda_install_hint() -> str:
    """What to type to get cuda-python; it must not be newer than the driver's CUDA major version."""
    jetson = find_jetson()
    if jetson is not None and jetson.jetpack == "6":
        return "pip install 'cuda-python>=12.6,<13'"
    return "pip install 'cuda-python>=12.6' (with a driver of CUDA 12: 'cuda-python>=12.6,<13')"


class CudaApi:
    """The CUDA calls that saae makes. Streams, events, graphs and addresses are integers.

    One object serves any number of engines and threads. Every method raises DeviceError (CudaFailure) if CUDA reports
    an error.

    Raises:
        BackendUnavailableError: cuda-python is not installed.
    """

    def __init__(self) -> None:
        try:
            self._rt: Any = importlib.import_module("cuda.bindings.runtime")
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise BackendUnavailableError(
                "CUDA cannot be reached from Python.", f"cuda-python is missing ({error}).", cuda_install_hint()
            ) from error
        rt = self._rt
        self._primary: dict[int, Any] = {}  # device -> its primary context, kept for the process's life
        self._primary_lock = threading.Lock()
        self._h2d = rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._d2h = rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._any = rt.cudaMemcpyKind.cudaMemcpyDefault  # CUDA sees from the addresses; also mapped host memory

    # -- driver and devices -----------------------------------------------------------------------------------------

    def driver_version(self) -> tuple[int, int]:
        """CUDA version that the installed driver supports; (0, 0) without a driver."""
        try:
            return _version(self._call("cudaDriverGetVersion"))
        except CudaFailure as error:
            if error.code == _UNREACHABLE:
                return 0, 0
            raise

    def runtime_version(self) -> tuple[int, int]:
        """CUDA version that cuda-python was made for."""
        return _version(self._call("cudaRuntimeGetVersion"))

    def check_driver(self, needs_major: int | None = None) -> None:
        """Check that a driver is installed and new enough, before anything uses the GPU.

        Args:
            needs_major: CUDA major version that another library was made for.

        Raises:
            DeviceError: no driver, or one that is too old, with both versions.
        """
        driver = self.driver_version()
        if driver == (0, 0):
            raise DeviceError(
                "No NVIDIA driver is installed or reachable.",
                "libcuda answers no version; in a container the GPU may not be passed through.",
                "install the NVIDIA driver (in a container: run it with --gpus all), or use backend='onnxruntime:cpu'",
            )
        runtime = self.runtime_version()
        for what, major in (("cuda-python", runtime[0]), ("the TensorRT library", needs_major)):
            if major is not None and driver[0] < major:
                raise DeviceError(
                    "The NVIDIA driver is too old.",
                    f"It supports CUDA {driver[0]}.{driver[1]}; {what} here is made for CUDA {major}.",
                    f"update the driver, or install packages made for CUDA {driver[0]} "
                    f"(pip install 'cuda-python~={driver[0]}.0'; TensorRT: the -cu{driver[0]} packages)",
                )

    def device_count(self) -> int:
        """Number of GPUs that CUDA sees."""
        status, count = self._raw("cudaGetDeviceCount")
        if status.name == "cudaErrorNoDevice":
            return 0
        self._check("cudaGetDeviceCount", status)
        return int(count)

    def device(self, index: int) -> GpuInfo:
        """Name, generation and memory of one GPU, without making a context on it.

        Raises:
            DeviceError: no such GPU.
        """
        count = self.device_count()
        if not 0 <= index < count:
            raise DeviceError(
                f"There is no GPU {index}.",
                f"CUDA sees {count} GPU{'' if count == 1 else 's'} here.",
                f"device=0 to {count - 1}; CUDA_VISIBLE_DEVICES hides and renumbers GPUs"
                if count
                else "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use backend='onnxruntime:cpu'",
            )
        properties = self._call("cudaGetDeviceProperties", index)
        name = properties.name
        return GpuInfo(
            index=index,
            name=name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name),
            sm=f"sm{properties.major}{properties.minor}",
            memory=int(properties.totalGlobalMem),
            integrated=bool(properties.integrated),
        )

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Make a device's primary context current in this thread, and restore the previous one.

        Other libraries choose a device, too (torch), or make their own context (pycuda.autoinit), in which our streams
        and memory are invalid. The driver pushes and pops it: cudaSetDevice would make a context on device 0 in a
        thread without one, which takes some 300 MiB.
        """
        primary = self._retained(device)
        if int(self._context()) == int(primary):
            yield
            return
        self._drive("cuCtxPushCurrent", primary)
        try:
            yield
        finally:
            self._drive("cuCtxPopCurrent")

    def _retained(self, device: int) -> Any:
        """A device's primary context, the one that the CUDA runtime, torch and CuPy use."""
        with self._primary_lock:
            if device not in self._primary:
                self._drive("cuInit", 0)
                self._primary[device] = self._drive("cuDevicePrimaryCtxRetain", self._drive("cuDeviceGet", device))
            return self._primary[device]

    def _drive(self, name: str, *arguments: Any) -> Any:
        """A call of the driver."""
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # no libcuda
            raise CudaFailure("No usable NVIDIA GPU or driver.", f"{name}: {error}", _DOCTOR, _UNREACHABLE) from error
        if int(status) != 0:
            code = getattr(status, "name", str(status))
            if code == "CUDA_ERROR_OUT_OF_MEMORY":
                what, cure = "The GPU is out of memory: it has no room for a context.", "close what else uses the GPU"
                raise CudaFailure(what, f"{name}: {code}", cure, code)
            raise CudaFailure("A call to CUDA's driver failed.", f"{name}: {code}", _DOCTOR, code)
        return values[0] if values else None

    def _context(self) -> Any:
        """This thread's context; 0 without one."""
        try:
            status, context = self._driver.cuCtxGetCurrent()
        except RuntimeError:  # no libcuda: the next call of the runtime raises an error
            return 0
        return context if int(status) == 0 else 0

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes on the current device."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    # -- memory -----------------------------------------------------------------------------------------------------

    def malloc(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes.

        Raises:
            DeviceError: out of memory, with what was asked for and what is free.
        """
        return int(self._call("cudaMalloc", nbytes, size=nbytes))

    def free(self, pointer: int) -> None:
        """Give device memory back; wait for the work that uses it."""
        self._call("cudaFree", pointer)

    def host_alloc(self, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Pinned host memory: its address and the bytes as an array, valid until `host_free`."""
        pointer = int(self._call("cudaHostAlloc", nbytes, self._rt.cudaHostAllocPortable, size=nbytes))
        return pointer, np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))

    def host_free(self, pointer: int) -> None:
        """Give pinned memory back."""
        self._call("cudaFreeHost", pointer)

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        """Pinned host to device, asynchronous."""
        self._call("cudaMemcpyAsync", device, host, nbytes, self._h2d, stream)

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        """Device to pinned host, asynchronous."""
        self._call("cudaMemcpyAsync", host, device, nbytes, self._d2h, stream)

    def copy_within(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Device, or mapped host memory, to device, asynchronous."""
        self._call("cudaMemcpyAsync", target, source, nbytes, self._any, stream)

    def pointer_device(self, pointer: int) -> int | None:
        """The device that an address belongs to or, for host memory, is mapped to; None where CUDA cannot read it.

        Mapped host memory is what jetson-utils gives frames in; under unified addressing its address is one for both.
        """
        attributes = self._call("cudaPointerGetAttributes", pointer)
        kinds = self._rt.cudaMemoryType
        if attributes.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged):
            return int(attributes.device)
        if attributes.type == kinds.cudaMemoryTypeHost and int(attributes.devicePointer or 0) == pointer:
            return int(attributes.device)
        return None

    def reachable(self, pointer: int, device: int) -> bool:
        """Whether device memory can be read in the device's primary context, which `on` has made current.

        Memory of stream-ordered pools and of mapped ranges belongs to no context and can be read in any.
        """
        wanted = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        status, context = self._driver.cuPointerGetAttribute(wanted, pointer)
        owner = int(context) if int(status) == 0 and context is not None else 0
        return owner in (0, int(self._primary.get(device, 0)))

    # -- streams and events -----------------------------------------------------------------------------------------

    def stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; its pending work still ends."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cudaStreamSynchronize", stream)

    def synchronize_device(self) -> None:
        """Wait for all work on the current device, also of other libraries."""
        self._call("cudaDeviceSynchronize")

    def event(self, blocking: bool = False) -> int:
        """An event without timing, which is cheap; `blocking`: waiting threads sleep."""
        flags = int(self._rt.cudaEventDisableTiming) | (int(self._rt.cudaEventBlockingSync) if blocking else 0)
        return int(self._call("cudaEventCreateWithFlags", flags))

    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Mark the present end of a stream."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Make later work of a stream wait for the last `record` of an event."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait_host(self, event: int) -> None:
        """Make the calling thread wait for the last `record` of an event."""
        self._call("cudaEventSynchronize", event)

    # -- graphs -----------------------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """Record later work of a stream instead of running it; other threads may go on using CUDA."""
        self._call("cudaStreamBeginCapture", stream, self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> int:
        """End a recording and make it launchable.

        Raises:
            DeviceError: the capture was invalidated; the stream is back in its normal state.
        """
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self, stream: int) -> None:
        """End an unwanted capture; never raises."""
        with suppress(CudaFailure):
            _, graph = self._raw("cudaStreamEndCapture", stream)
            if graph is not None and int(graph) != 0:
                self._raw("cudaGraphDestroy", graph)
            self._raw("cudaGetLastError")  # a failed capture leaves its error behind

    def launch(self, graph: int, stream: int) -> None:
        """Run a recorded graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Destroy a recorded graph."""
        self._call("cudaGraphExecDestroy", graph)

    # -- errors -----------------------------------------------------------------------------------------------------

    def _raw(self, name: str, *arguments: Any) -> Any:
        """Call cuda-python. Releases before 12.9 raise an error without libcuda; later ones return it."""
        try:
            return getattr(self._rt, name)(*arguments)
        except RuntimeError as error:
            raise CudaFailure("No usable NVIDIA GPU or driver.", f"{name}: {error}", _DOCTOR, _UNREACHABLE) from error

    def _call(self, name: str, *arguments: Any, size: int = 0) -> Any:
        status, *values = self._raw(name, *arguments)
        if int(status) != 0:
            self._check(name, status, size)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, status: Any, size: int = 0) -> None:
        if int(status) == 0:
            return
        code = status.name
        _, text = self._rt.cudaGetErrorString(status)
        reason = f"{name}: {text.decode() if isinstance(text, bytes) else text} ({code})"
        self._rt.cudaGetLastError()
        if code == "cudaErrorMemoryAllocation":
            raise CudaFailure(
                f"The GPU is out of memory: {_mib(size)} were asked for.",
                f"{reason}; {self._free_text()}",
                "close what else uses the GPU (nvidia-smi), use fewer slots or a smaller max_batch, or build the "
                "engine with a smaller --max-batch",
                code,
            )
        if code in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"):
            raise CudaFailure("No usable NVIDIA GPU or driver.", reason, _DOCTOR, code)
        raise CudaFailure(
            "A call to CUDA failed.",
            reason,
            "if this repeats, close the engine and restart the process: after some errors a GPU context is lost",
            code,
        )

    def _free_text(self) -> str:
        status, free, total = self._rt.cudaMemGetInfo()
        return f"{_mib(int(free))} of {_mib(int(total))} are free" if int(status) == 0 else "free memory is unknown"


def _version(number: Any) -> tuple[int, int]:
    return int(number) // 1000, int(number) % 1000 // 10


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
