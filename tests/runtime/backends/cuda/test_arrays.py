"""Arrays of other libraries on the GPU: found where they lie, checked, and kept alive."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from fake_cuda import FakeArray, FakeCuda

from saae_runtime.backends.cuda.arrays import DeviceArray, is_device_array, read_device_frames
from saae_runtime.errors import FrameError

# -- arrays on the GPU


SIZE = (4, 6)


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
