"""Frames that lie on the GPU, and outputs that stay there, against a fake CUDA that really orders the work."""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
from fake_backend import SIZE, check, frames, make
from fake_cuda import FakeArray, FakeCuda, expected_map
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import (
    BackendError,
    DeviceError,
)

# -- arrays on the device


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_frames_on_the_gpu_go_in_without_touching_the_host(seed, graph):
    cuda = FakeCuda(seed=seed)
    backend, _ = make(cuda, cuda_graph=graph)
    for number in range(4):
        given = frames(2, number)
        producer = cuda.stream()
        array = FakeArray(cuda, np.zeros_like(given), stream=producer)
        late = given.reshape(-1)
        # The producer writes the frames later, on its own stream: the engine has to wait for it.
        cuda.enqueue(producer, lambda array=array, late=late: cuda.at(array.pointer, late.size).__setitem__(..., late))
        cuda.log.clear()
        check(backend.infer(array, 0.5), given, 0.5)
        assert len(cuda.calls("copy_within")) == 1
        assert all(nbytes == 4 for _, (_, _, nbytes, _) in cuda.calls("copy_in"))  # the threshold only


def test_frames_from_a_stream_that_nobody_names_are_waited_for():
    for seed in range(10):
        cuda = FakeCuda(seed=seed)
        backend, _ = make(cuda)
        given = frames(2)
        producer = cuda.stream()
        array = FakeArray(cuda, np.zeros_like(given), version=2)
        late = given.reshape(-1)
        cuda.enqueue(producer, lambda: cuda.at(array.pointer, late.size).__setitem__(..., late))  # noqa: B023
        check(backend.infer(array, 0.5), given, 0.5)


def test_outputs_stay_on_the_gpu_until_they_are_released():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=2)
    given = frames(2)
    with backend.infer_on_device(given, 0.5) as outputs:
        assert cuda.calls("copy_out") == []
        check(backend.infer(frames(2, 5), 0.5), frames(2, 5), 0.5)  # another slot: nothing is overwritten
        outputs.synchronize()
        interface = outputs.anomaly_map.__cuda_array_interface__
        assert interface["shape"] == (2, *SIZE)
        values = cuda.at(interface["data"][0], 2 * 8 * 16 * 4).view(np.float32).reshape(2, *SIZE)
        np.testing.assert_array_equal(values, expected_map(given))
        assert outputs.mask.dtype == np.uint8
        assert outputs.score.shape == (2,)


def test_lent_outputs_use_up_slots_until_released_or_forgotten():
    backend, _ = make(FakeCuda(), slots=2)
    kept = [backend.infer_on_device(frames(1), 0.5) for _ in range(2)]
    with pytest.raises(BackendError, match="slots are in use") as caught:
        backend.infer_on_device(frames(1), 0.5)
    assert "release" in caught.value.cure
    check(backend.infer(frames(1, 4), 0.5), frames(1, 4), 0.5)  # outputs to the host still have a way
    kept[0].release()
    kept[0].release()
    backend.infer_on_device(frames(1), 0.5).release()
    only_map = kept.pop().anomaly_map
    kept.clear()
    gc.collect()
    with backend.infer_on_device(frames(1), 0.5), pytest.raises(BackendError, match="in use"):
        backend.infer_on_device(frames(1), 0.5)  # `only_map` still keeps its slot
    del only_map
    gc.collect()
    with backend.infer_on_device(frames(1), 0.5):
        backend.infer_on_device(frames(1), 0.5).release()


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_reader_on_another_stream_is_waited_for_before_the_memory_is_used_again(seed):
    cuda = FakeCuda(seed=seed)
    backend, _ = make(cuda, slots=1, cuda_graph=False)
    given = frames(1)
    outputs = backend.infer_on_device(given, 0.5)
    outputs.synchronize()
    reader, seen = cuda.stream(), []
    pointer = outputs.anomaly_map.pointer
    cuda.enqueue(reader, lambda: seen.append(cuda.at(pointer, 8 * 16 * 4).view(np.float32).copy()))
    outputs.release(stream=reader)
    backend.infer(frames(1, 8), 0.5)
    np.testing.assert_array_equal(seen[0].reshape(SIZE), expected_map(given)[0])


@given(seed=st.integers(0, 1000), graph=st.booleans(), on_gpu=st.booleans(), slots=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_outputs_given_back_before_they_are_written_do_not_mix_with_the_next(seed, graph, on_gpu, slots):
    """The host never waits: readers do, on their own streams."""
    cuda = FakeCuda(seed=seed)
    backend, _ = make(cuda, slots=slots, cuda_graph=graph)
    seen, wanted = [], []
    for number in range(6):
        given = frames(1 + number % 2, number)
        held = FakeArray(cuda, given) if on_gpu else given
        outputs = backend.infer_on_device(held, 0.5)
        reader, pointer = cuda.stream(), outputs.anomaly_map.pointer
        outputs.hold(reader)
        size = given.nbytes // 3 * 4
        cuda.enqueue(reader, lambda p=pointer, n=size: seen.append((p, cuda.at(p, n).view(np.float32).copy())))
        outputs.release(stream=reader)
        wanted.append(expected_map(given).reshape(-1))
    cuda.synchronize_device()
    assert len(seen) == len(wanted)
    for values in wanted:
        assert any(np.array_equal(values, found) for _, found in seen)
    backend.close()
    assert cuda.live()["device"] == cuda.live()["host"] == 0


def test_frames_on_the_gpu_are_kept_alive_until_they_were_read():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    array = FakeArray(cuda, frames(1))
    alive = weakref.ref(array)
    outputs = backend.infer_on_device(array, 0.5)
    del array
    gc.collect()
    assert alive() is not None  # torch would give its memory to somebody else
    outputs.synchronize()
    gc.collect()
    assert alive() is None


def test_outputs_cannot_be_read_after_they_were_given_back_or_the_engine_is_closed():
    backend, _ = make(FakeCuda(), slots=2)
    released = backend.infer_on_device(frames(1), 0.5)
    released.release()
    closed = backend.infer_on_device(frames(1), 0.5)
    backend.close()
    for outputs, word in ((released, "closed"), (closed, "closed")):
        for use in (lambda o=outputs: o.anomaly_map.__cuda_array_interface__, outputs.synchronize):
            with pytest.raises(BackendError, match="no longer valid") as caught:
                use()
            assert word in caught.value.why
        outputs.release(stream=1)  # harmless
    other, _ = make(FakeCuda())
    with other.infer_on_device(frames(1), 0.5) as lent:
        pass
    with pytest.raises(BackendError) as caught:
        lent.hold(1)
    assert "released" in caught.value.why


def test_a_reader_may_give_outputs_back_while_another_thread_captures():
    """A wait for the engine's stream that falls into a capture of it would spoil the graph."""
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=3)
    outputs = backend.infer_on_device(frames(2), 0.5)
    reader = cuda.stream()
    given, calls = frames(1, 3), []
    begin = cuda.begin_capture

    def meanwhile(stream):
        begin(stream)
        calls.append(outputs.score.__cuda_array_interface__["stream"])
        outputs.release(stream=reader)

    cuda.begin_capture = meanwhile
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            check(backend.infer(given, 0.5), given, 0.5)
    assert len(calls) == 1
    assert len(cuda.calls("launch")) >= 1


def test_after_a_failure_nothing_still_reads_the_callers_memory():
    cuda = FakeCuda()
    backend, engine = make(cuda, slots=1)
    array = FakeArray(cuda, frames(1))
    engine.refuse = True
    with pytest.raises(DeviceError):
        backend.infer(array, 0.5)
    del cuda._blocks[array.pointer]  # the caller frees it
    engine.refuse = False
    check(backend.infer(frames(1, 2), 0.5), frames(1, 2), 0.5)
