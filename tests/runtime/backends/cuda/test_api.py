"""CUDA by cuda-python: its calls exist in the installed wheel, and contexts are put back; no GPU needed."""

from __future__ import annotations

import inspect
import re
import sys
from types import SimpleNamespace

import pytest
from fake_cuda import FakeCuda
from needs import need

from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.tensorrt.slots import Resources
from saae_runtime.errors import BackendUnavailableError, DeviceError

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
