"""Slots: buffers in one block, capacity, and giving everything back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fake_cuda import FakeCuda, out_of_memory
from hypothesis import given
from hypothesis import strategies as st

from saae_runtime.backends.tensorrt.library import TensorInfo
from saae_runtime.backends.tensorrt.slots import ALIGNMENT, BufferPlan, Resources, capacity_for
from saae_runtime.errors import DeviceError

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
