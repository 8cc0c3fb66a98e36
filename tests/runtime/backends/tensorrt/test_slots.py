"""Memory layout, slots and device arrays of the TensorRT backend, and CudaApi where there is no driver."""

from __future__ import annotations

import gc
import inspect
import itertools
import re
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeArray, FakeCuda, out_of_memory
from hypothesis import given
from hypothesis import strategies as st
from needs import need

from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.cuda.arrays import DeviceArray, is_device_array, read_device_frames
from saae_runtime.backends.tensorrt.library import TensorInfo
from saae_runtime.backends.tensorrt.slots import ALIGNMENT, BufferPlan, Resources, capacity_for
from saae_runtime.errors import BackendUnavailableError, DeviceError, FrameError

SIZE = (4, 6)


def tensors(height=4, width=6):
    return (
        TensorInfo("frame", (-1, height, width, 3), np.dtype(np.uint8), True),
        TensorInfo("threshold", (1,), np.dtype(np.float32), True),
        TensorInfo("anomaly_map", (-1, height, width), np.dtype(np.float32), False),
        TensorInfo("score", (-1,), np.dtype(np.float32), False),
        TensorInfo("mask", (-1, height, width), np.dtype(np.uint8), False),
    )


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 17))
def test_buffers_are_aligned_apart_and_inside_the_block(height, width, capacity):
    plan = BufferPlan.make(tensors(height, width), capacity)
    spans = sorted((plan.offsets[t.name], plan.nbytes(t.name, capacity)) for t in plan.tensors)
    assert all(offset % ALIGNMENT == 0 for offset, _ in spans)
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    assert spans[-1][0] + spans[-1][1] <= plan.total
    pixels = capacity * height * width
    assert sum(size for _, size in spans) == 3 * pixels + 4 + 4 * pixels + 4 * capacity + pixels


@given(st.integers(1, 6), st.data())
def test_views_share_the_block_and_do_not_overlap(capacity, data):
    batch = data.draw(st.integers(1, capacity))
    plan = BufferPlan.make(tensors(), capacity)
    block = np.zeros(plan.total, np.uint8)
    for number, tensor in enumerate(plan.tensors, 1):
        view = plan.view(block, tensor.name, batch)
        assert view.dtype == tensor.dtype
        assert view.shape == tuple(batch if side == -1 else side for side in tensor.shape)
        view[...] = number
    for number, tensor in enumerate(plan.tensors, 1):
        assert (plan.view(block, tensor.name, batch) == number).all()


@given(st.integers(1, 300), st.integers(1, 300))
def test_capacity_holds_the_batch_and_stays_in_the_profile(batch, largest):
    if batch > largest:
        batch, largest = largest, batch
    assert batch <= capacity_for(batch, largest) <= largest
    assert capacity_for(batch, largest) < 2 * batch


def test_capacity_grows_only_a_few_times_up_to_the_largest_batch():
    assert len({capacity_for(batch, 32) for batch in range(1, 33)}) == 6


def test_resources_give_everything_back_once():
    cuda = FakeCuda()
    resources = Resources(cuda, 0, object(), tensors())
    for capacity in (1, 4):
        resources.reserve(resources.add_slot(), capacity)
    resources.grow_workspace(5000, lambda context, pointer, size: None)
    assert cuda.live() == {"device": 3, "host": 2, "streams": 4, "events": 8, "graphs": 0}
    resources.release()
    assert set(cuda.live().values()) == {0}
    calls = len(cuda.log)
    resources.release()
    assert len(cuda.log) == calls


def test_a_slot_that_finds_no_room_keeps_what_it_had():
    cuda = FakeCuda()
    resources = Resources(cuda, 0, object(), tensors())
    slot = resources.add_slot()
    resources.reserve(slot, 1)
    before = (slot.device, slot.host, slot.layout)
    for method in ("malloc", "host_alloc"):
        cuda.fail[method] = out_of_memory()
        with pytest.raises(DeviceError, match="out of memory"):
            resources.reserve(slot, 4)
        cuda.fail.clear()
        assert (slot.device, slot.host, slot.layout) == before
        assert cuda.live()["device"] == cuda.live()["host"] == 1


def test_streams_are_given_back_when_one_cannot_be_made():
    cuda = FakeCuda()
    cuda.fail["stream"] = [None, None, DeviceError("no more")]
    with pytest.raises(DeviceError):
        Resources(cuda, 0, object(), tensors())
    assert cuda.live()["streams"] == 0


def test_release_goes_on_past_a_driver_that_is_gone():
    cuda = FakeCuda()
    resources = Resources(cuda, 0, object(), tensors())
    resources.reserve(resources.add_slot(), 1)
    cuda.fail["free"] = DeviceError("the driver is shutting down")
    resources.release()
    assert resources.released
    assert cuda.live()["host"] == cuda.live()["streams"] == cuda.live()["events"] == 0


# -- arrays on the GPU


def frames(count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), np.uint8)


def test_frames_on_the_gpu_are_found_where_they_lie():
    cuda = FakeCuda()
    array = FakeArray(cuda, frames(), stream=77)
    found = read_device_frames(array, SIZE, cuda, 0, 5)
    assert (found.pointer, found.count, found.stream) == (array.pointer, 2, 77)
    assert found.owner is array


def test_a_single_frame_counts_as_one_and_explicit_strides_may_be_those_of_contiguous_memory():
    cuda = FakeCuda()
    array = FakeArray(cuda, frames()[0], strides=(18, 3, 1))
    assert read_device_frames(array, SIZE, cuda, 0, 5).count == 1


def test_version_2_names_no_stream_so_the_device_is_waited_for():
    cuda = FakeCuda()
    old = read_device_frames(FakeArray(cuda, frames(), version=2), SIZE, cuda, 0, 5)
    assert (old.stream, old.unordered) == (None, True)
    new = read_device_frames(FakeArray(cuda, frames(), version=3), SIZE, cuda, 0, 5)
    assert (new.stream, new.unordered) == (None, False)


@pytest.mark.parametrize(
    ("array", "changes", "words"),
    [
        (np.zeros((2, *SIZE, 3), np.float32), {}, ("float32", "uint8")),
        (np.zeros((2, 5, 6, 3), np.uint8), {}, ("(2, 5, 6, 3)", "(4, 6, 3)")),
        (np.zeros((2, 3, *SIZE), np.uint8), {}, ("channels come last",)),
        (np.zeros((4, 6), np.uint8), {}, ("(4, 6)",)),
        (np.zeros((2, *SIZE, 3), np.uint8), {"strides": (144, 36, 6, 1)}, ("not contiguous", "contiguous()")),
        (np.zeros((2, *SIZE, 3), np.uint8), {"strides": (72, 18, -3, 1)}, ("not contiguous",)),
    ],
)
def test_arrays_that_do_not_fit_say_what_they_are_and_what_is_wanted(array, changes, words):
    cuda = FakeCuda()
    with pytest.raises(FrameError) as caught:
        read_device_frames(FakeArray(cuda, array, **changes), SIZE, cuda, 0, 5)
    for word in words:
        assert word in str(caught.value)


def test_an_array_on_another_gpu_names_both():
    cuda = FakeCuda(devices=("sm89", "sm89"))
    with pytest.raises(FrameError, match=r"GPU 1.*GPU 0") as caught:
        read_device_frames(FakeArray(cuda, frames(), device=1), SIZE, cuda, 0, 5)
    assert "device=1" in caught.value.cure


def test_an_array_of_another_context_says_how_to_make_it_in_the_right_one():
    cuda = FakeCuda()
    array = FakeArray(cuda, frames())
    cuda.elsewhere.add(array.pointer)
    with pytest.raises(FrameError, match="another CUDA context") as caught:
        read_device_frames(array, SIZE, cuda, 0, 5)
    assert "autoprimaryctx" in caught.value.cure


def test_a_pointer_to_host_memory_is_refused():
    cuda = FakeCuda()
    array = FakeArray(cuda, frames())
    array.__cuda_array_interface__["data"] = (cuda.host_alloc(200)[0], False)
    with pytest.raises(FrameError, match="host memory"):
        read_device_frames(array, SIZE, cuda, 0, 5)


def test_what_counts_as_a_device_array():
    assert not is_device_array(frames())  # numpy has DLPack too, for the host
    assert not is_device_array([frames()])
    assert is_device_array(FakeArray(FakeCuda(), frames()))

    class OnGpu:
        def __dlpack__(self, stream=None):
            raise AssertionError("not asked for")

        def __dlpack_device__(self):
            return 2, 0

    assert is_device_array(OnGpu())


def test_a_dlpack_view_lives_as_long_as_its_frames(monkeypatch):
    """An exporter takes the memory back when the view goes: that must not be before the copy has run."""

    class View:
        dtype, strides, shape = np.uint8, None, (2, *SIZE, 3)

        def __init__(self, value):
            self.ptr = value.pointer

        @classmethod
        def from_dlpack(cls, value, stream_ptr):
            made.append(weakref.ref(view := cls(value)))
            return view

    class OnGpu:
        def __init__(self, pointer):
            self.pointer = pointer

        def __dlpack__(self, stream=None):
            raise AssertionError("the view asks for it")

        def __dlpack_device__(self):
            return 2, 0

    made = []
    monkeypatch.setattr("saae_runtime.backends.cuda.arrays._view_type", lambda needed: View)
    cuda = FakeCuda()
    given = frames()
    found = read_device_frames(OnGpu(cuda.put(given)), SIZE, cuda, 0, 0)
    gc.collect()
    assert made[0]() is not None
    del found
    gc.collect()
    assert made[0]() is None


@pytest.mark.needs("cuda.core")
def test_dlpack_is_read_by_cuda_core():
    """A host array through the same door: layout is read, and the place is refused."""

    class Wrapped:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    cuda = FakeCuda()
    array = frames()
    with pytest.raises(FrameError, match="host memory"):
        read_device_frames(Wrapped(array), SIZE, cuda, 0, -1)
    cuda.pointer_device = lambda pointer: 0 if pointer == array.ctypes.data else None
    found = read_device_frames(Wrapped(array), SIZE, cuda, 0, -1)
    assert (found.pointer, found.count, found.stream, found.unordered) == (array.ctypes.data, 2, None, False)
    seen = []

    class Torch(Wrapped):
        """Like a torch tensor: an interface without a stream, and DLPack, which orders the streams."""

        __cuda_array_interface__: dict = {"version": 2}  # noqa: RUF012

        def __dlpack__(self, **options):
            seen.append(options.get("stream"))
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return 2, 0

    assert not read_device_frames(Torch(array), SIZE, cuda, 0, 77).unordered
    assert seen == [77]
    with pytest.raises(FrameError, match="not contiguous"):
        read_device_frames(Wrapped(array[:, :, ::-1]), SIZE, cuda, 0, -1)
    with pytest.raises(FrameError, match="int16"):
        read_device_frames(Wrapped(array.astype(np.int16)), SIZE, cuda, 0, -1)


def test_outputs_on_the_gpu_speak_the_array_interface():
    array = DeviceArray(4096, (2, 4, 6), np.dtype(np.float32), 7, None, lambda: None)
    interface = array.__cuda_array_interface__
    assert interface["data"] == (4096, False)
    assert (interface["shape"], interface["typestr"], interface["stream"], interface["version"]) == (
        (2, 4, 6),
        "<f4",
        7,
        3,
    )


# -- CudaApi itself


def public_methods(kind):
    return {
        name: list(inspect.signature(member).parameters)
        for name, member in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


def test_the_fake_has_exactly_the_methods_of_the_real_one():
    real, fake = public_methods(CudaApi), public_methods(FakeCuda)
    assert {name: fake.get(name) for name in real} == real
    assert set(fake) - set(real) == {"at", "calls", "enqueue", "live", "put"}


def test_every_cuda_function_that_is_called_exists_in_the_installed_wheel():
    runtime = need("cuda.bindings.runtime")
    source = inspect.getsource(CudaApi)
    names = set(re.findall(r'"(cuda[A-Z]\w+)"', source))
    names = {name for name in names if not name.startswith("cudaError")}
    assert len(names) > 20
    assert [name for name in names if not hasattr(runtime, name)] == []
    errors = {code for code in re.findall(r'"(cudaError\w+)"', source) if code != "cudaError"}
    assert [code for code in errors if not hasattr(runtime.cudaError_t, code)] == []
    for group, member in re.findall(r"\b(cudaM\w+Kind|cudaMemoryType|cudaStreamCaptureMode)\.(\w+)", source):
        assert hasattr(getattr(runtime, group), member)
    for constant in (
        "cudaHostAllocPortable",
        "cudaStreamNonBlocking",
        "cudaEventDisableTiming",
        "cudaEventBlockingSync",
    ):
        assert hasattr(runtime, constant)


def has_driver():
    try:
        return CudaApi().driver_version() != (0, 0)
    except BackendUnavailableError:
        return False


@pytest.mark.needs("cuda.bindings.runtime")
def test_no_driver_is_said_plainly():
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match="No NVIDIA driver") as caught:
        CudaApi().check_driver()
    assert "onnxruntime:cpu" in caught.value.cure


@pytest.mark.needs("cuda.bindings.runtime")
def test_calls_without_a_driver_are_errors_of_ours_and_not_crashes():
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    api = CudaApi()
    for call in (api.device_count, lambda: api.malloc(1024), api.stream, api.memory_info):
        with pytest.raises(DeviceError) as caught:
            call()
        assert "doctor" in caught.value.cure


def test_the_wheel_takes_plain_integers_everywhere():
    """Without a driver every call fails, but first it converts its arguments: a wrong type would be a TypeError."""
    runtime = need("cuda.bindings.runtime")
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    api = CudaApi()
    calls = [
        lambda: api.malloc(256),
        lambda: api.free(512),
        lambda: api.host_alloc(256),
        lambda: api.host_free(512),
        lambda: api.copy_in(512, 1024, 16, 3),
        lambda: api.copy_out(1024, 512, 16, 3),
        lambda: api.copy_within(512, 1024, 16, 3),
        lambda: api.pointer_device(512),
        lambda: api.destroy_stream(3),
        lambda: api.synchronize(3),
        api.synchronize_device,
        api.event,
        lambda: api.destroy_event(4),
        lambda: api.record(4, 3),
        lambda: api.wait(3, 4),
        lambda: api.wait_host(4),
        lambda: api.begin_capture(3),
        lambda: api.end_capture(3),
        lambda: api.launch(5, 3),
        lambda: api.destroy_graph(5),
        lambda: api.on(0).__enter__(),
    ]
    for call in calls:
        with pytest.raises(DeviceError):
            call()
    api.abandon_capture(3)
    assert int(runtime.cudaStream_t(7)) == int(runtime.cudaEvent_t(7)) == int(runtime.cudaGraphExec_t(7)) == 7
    for name in ("name", "major", "minor", "totalGlobalMem", "integrated"):
        assert hasattr(runtime.cudaDeviceProp(), name)


@pytest.mark.needs("cuda.bindings.runtime")
@pytest.mark.parametrize(("driver", "major", "says"), [((12, 6), None, "CUDA 13"), ((13, 0), 14, "CUDA 14")])
def test_a_driver_that_is_too_old_names_both_versions(monkeypatch, driver, major, says):
    api = CudaApi()
    monkeypatch.setattr(api, "driver_version", lambda: driver)
    monkeypatch.setattr(api, "runtime_version", lambda: (13, 0))
    with pytest.raises(DeviceError, match="too old") as caught:
        api.check_driver(major)
    assert says in caught.value.why
    assert f"CUDA {driver[0]}.{driver[1]}" in caught.value.why


def test_cuda_python_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendUnavailableError, match="cuda-python") as caught:
        CudaApi()
    assert "pip install" in caught.value.cure


class Contexts:
    """The calls of `CudaApi.on`: contexts 1000 + device are the primary ones, any other is somebody's own."""

    def __init__(self, devices=2, current=0):
        self.devices, self.current = devices, current
        self.calls, self.below = [], []
        self.made = set()  # devices that a context was made on

    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_CONTEXT=1)

    def cuPointerGetAttribute(self, attribute, pointer):
        """The address says whose it is: 17700 lies in context 7700; below 10000 in none; 99999 is nobody's."""
        assert attribute == 1
        return (1, None) if pointer == 99999 else (0, max(0, pointer - 10000))

    def cuInit(self, flags):
        return (0,)

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        self.made.add(device)
        return 0, 1000 + device

    def cuCtxGetCurrent(self):
        return 0, self.current

    def cuCtxPushCurrent(self, context):
        self.calls.append(context)
        self.below.append(self.current)
        self.current = context
        return (0,)

    def cuCtxPopCurrent(self):
        popped, self.current = self.current, self.below.pop()
        return 0, popped


@pytest.mark.needs("cuda.bindings.runtime")
@pytest.mark.parametrize(
    ("current", "back"),
    [
        (0, 0),  # a fresh thread: it has no context before and after
        (1000, 1000),  # torch on the same device
        (1001, 1001),  # torch on another one
        (7700, 7700),  # pycuda.autoinit's own context on this device
        (7701, 7701),  # and on the other
    ],
)
def test_work_is_done_in_the_primary_context_and_the_callers_is_put_back(monkeypatch, current, back):
    api, contexts = CudaApi(), Contexts(current=current)
    monkeypatch.setattr(api, "_rt", contexts)
    monkeypatch.setattr(api, "_driver", contexts)
    for _ in range(2):
        with api.on(0):
            assert contexts.current == 1000
            with api.on(0):
                assert contexts.current == 1000
        assert contexts.current == back
    with pytest.raises(KeyError), api.on(0):
        raise KeyError
    assert contexts.current == back


@pytest.mark.needs("cuda.bindings.runtime")
def test_work_on_one_gpu_makes_no_context_on_another(monkeypatch):
    api, contexts = CudaApi(), Contexts()
    monkeypatch.setattr(api, "_rt", contexts)  # which has no cudaSetDevice: that makes a context where there is none
    monkeypatch.setattr(api, "_driver", contexts)
    for _ in range(3):
        with api.on(1):
            assert contexts.current == 1001
    assert contexts.made == {1}
    assert contexts.current == 0


@pytest.mark.needs("cuda.bindings.runtime")
def test_a_driver_that_refuses_a_context_is_an_error_of_ours(monkeypatch):
    class Status(int):
        name = "CUDA_ERROR_OUT_OF_MEMORY"

    api, contexts = CudaApi(), Contexts()
    monkeypatch.setattr(api, "_driver", contexts)
    monkeypatch.setattr(contexts, "cuDevicePrimaryCtxRetain", lambda device: (Status(2), None))
    with pytest.raises(DeviceError, match="out of memory"), api.on(0):
        pass


@pytest.mark.parametrize(
    ("kind", "device_pointer", "found"),
    [("Device", 512, 1), ("Managed", 512, 1), ("Host", 512, 1), ("Host", 0, None), ("Unregistered", 0, None)],
)
def test_host_memory_that_the_gpu_reads_counts_as_the_gpus(monkeypatch, kind, device_pointer, found):
    runtime = need("cuda.bindings.runtime")
    attributes = SimpleNamespace(
        type=getattr(runtime.cudaMemoryType, f"cudaMemoryType{kind}"), device=1, devicePointer=device_pointer
    )
    api = CudaApi()
    monkeypatch.setattr(api, "_call", lambda name, pointer: attributes)
    assert api.pointer_device(512) == found


def test_the_event_that_the_host_waits_for_lets_it_sleep():
    cuda = FakeCuda()
    resources = Resources(cuda, 0, None, ())
    slots = [resources.add_slot() for _ in range(2)]
    assert cuda.blocking == {slot.done for slot in slots}


@pytest.mark.needs("cuda.bindings.runtime")
def test_such_an_event_is_made_with_the_librarys_flag(monkeypatch):
    api, made = CudaApi(), []
    monkeypatch.setattr(api, "_call", lambda name, flags: made.append(flags) or 1)
    api.event(blocking=True)
    api.event()
    blocking = int(api._rt.cudaEventBlockingSync)
    assert [bool(flags & blocking) for flags in made] == [True, False]


@pytest.mark.needs("cuda.bindings.runtime")
def test_a_thread_that_is_in_the_right_context_pays_one_call(monkeypatch):
    api, contexts = CudaApi(), Contexts(current=1000)
    monkeypatch.setattr(api, "_rt", contexts)
    monkeypatch.setattr(api, "_driver", contexts)
    with api.on(0):
        pass
    contexts.calls.clear()
    for _ in range(5):
        with api.on(0):
            pass
    assert contexts.calls == []


@pytest.mark.needs("cuda.bindings.runtime")
@pytest.mark.parametrize(
    ("pointer", "reachable"),
    [(11000, True), (11001, False), (17700, False), (512, True), (99999, True)],
)
def test_memory_of_another_context_is_told_from_the_primary_ones(monkeypatch, pointer, reachable):
    api, contexts = CudaApi(), Contexts(current=7700)
    monkeypatch.setattr(api, "_rt", contexts)
    monkeypatch.setattr(api, "_driver", contexts)
    with api.on(0):
        assert api.reachable(pointer, 0) is reachable


def test_the_driver_calls_exist_in_the_installed_wheel():
    driver = need("cuda.bindings.driver")
    assert int(driver.CUcontext(7)) == 7
    names = set(re.findall(r'_driver\.(cu[A-Z]\w+)|"(cu[A-Z]\w+)"', inspect.getsource(CudaApi)))
    assert len(names) >= 6
    for name in ("".join(found) for found in names):
        assert hasattr(driver, name)
    assert hasattr(driver.CUpointer_attribute, "CU_POINTER_ATTRIBUTE_CONTEXT")
