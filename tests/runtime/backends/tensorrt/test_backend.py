"""The TensorRT backend against a fake CUDA that really orders the work, and its errors in flight."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
from fake_backend import FakeCudaForThreads, check, frames, make
from fake_cuda import FakeArray, FakeContext, FakeCuda
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import (
    BackendError,
    DeviceError,
    FrameError,
)

# -- results and order


@given(
    seed=st.integers(0, 10_000),
    eager=st.sampled_from([0.0, 0.5, 0.9]),
    graph=st.booleans(),
    slots=st.integers(1, 4),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_whatever_order_the_gpu_takes_results_are_right_and_in_order(seed, eager, graph, slots, batches):
    cuda = FakeCuda(seed=seed, eager=eager)
    backend, _ = make(cuda, slots=slots, cuda_graph=graph)
    flying = []
    for number, count in enumerate(batches):
        given, threshold = frames(count, number), 0.3 + 0.1 * (number % 3)
        flying.append((backend.submit(given, threshold), given, threshold))
        if len(flying) > slots:
            ticket, *rest = flying.pop(0)
            check(backend.collect(ticket), *rest)
    for ticket, *rest in flying:
        check(backend.collect(ticket), *rest)
    backend.close()
    assert set(cuda.live().values()) == {0}


def test_copies_and_computation_have_streams_of_their_own_tied_by_events():
    cuda = FakeCuda()
    backend, _ = make(cuda, cuda_graph=False)
    backend.infer(frames(1), 0.5)
    cuda.log.clear()
    backend.infer(frames(1), 0.5)
    names = [name for name, _ in cuda.log]
    assert names == [
        *("copy_in", "record", "wait", "execute"),
        *("record", "wait", "copy_out", "copy_out", "copy_out", "record", "wait_host"),
    ]
    (_, copy), (_, copied), (_, before), (_, run), (_, computed), (_, after), (_, out), *_, (_, done), (_, host) = (
        cuda.log
    )
    assert len({copy[-1], run[0], out[-1]}) == 3
    assert copied == (before[1], copy[-1])
    assert before[0] == run[0] == computed[1]
    assert after == (out[-1], computed[0])
    assert done[1] == out[-1]
    assert host == (done[0],)


def test_three_batches_are_in_flight_before_the_first_is_waited_for():
    cuda = FakeCuda()
    backend, _ = make(cuda, cuda_graph=False)
    given = [frames(1, number) for number in range(3)]
    tickets = [backend.submit(item, 0.5) for item in given]
    assert len(cuda.calls("execute")) == 3
    assert cuda.calls("wait_host", "synchronize") == []
    for ticket, item in zip(tickets, given, strict=True):
        check(backend.collect(ticket), item, 0.5)


def test_more_batches_than_slots_wait_their_turn():
    backend, _ = make(FakeCuda(), slots=2)
    given = [frames(1, number) for number in range(7)]
    tickets = [backend.submit(item, 0.5) for item in given]
    for ticket, item in zip(tickets, given, strict=True):
        check(backend.collect(ticket), item, 0.5)


def test_outputs_belong_to_the_caller():
    backend, _ = make(FakeCuda(), slots=1)
    given = frames(2)
    first = backend.infer(given, 0.5)
    backend.infer(frames(2, 9), 0.9)
    check(first, given, 0.5)


def test_a_ticket_is_collected_once():
    backend, _ = make(FakeCuda())
    ticket = backend.submit(frames(1), 0.5)
    backend.collect(ticket)
    with pytest.raises(BackendError, match="twice"):
        backend.collect(ticket)


def test_a_batch_below_the_profile_is_filled_up_and_cut_again():
    cuda = FakeCuda()
    backend, engine = make(cuda, profile=(3, 4, 5))
    given = frames(2)
    check(backend.infer(given, 0.5), given, 0.5)
    assert [context.batch for context in engine.contexts] == [3]


@pytest.mark.parametrize("count", [0, 6])
def test_a_batch_outside_the_profile_names_both_sides(count):
    backend, _ = make(FakeCuda())
    with pytest.raises(FrameError, match=f"batch of {count} .* 1 to 5"):
        backend.infer(frames(count), 0.5)
    check(backend.infer(frames(5), 0.5), frames(5), 0.5)


def test_max_batch_narrows_the_profile():
    backend, _ = make(FakeCuda(), max_batch=2)
    assert backend.max_batch == 2
    with pytest.raises(FrameError, match="1 to 2"):
        backend.infer(frames(3), 0.5)


@pytest.mark.parametrize("bad", [np.zeros((1, 8, 16, 3), np.float32), np.zeros((1, 7, 16, 3), np.uint8), [[1]]])
def test_frames_of_another_kind_are_refused_and_the_slot_is_free_again(bad):
    backend, _ = make(FakeCuda(), slots=1)
    for _ in range(3):
        with pytest.raises(FrameError, match="takes uint8"):
            backend.infer(bad, 0.5)
    given = frames(1)
    check(backend.infer(given, 0.5), given, 0.5)


# -- memory and graphs


def test_nothing_is_allocated_in_the_steady_state():
    cuda = FakeCuda()
    backend, _ = make(cuda)
    for _ in range(3):
        for count in (5, 1, 3):
            tickets = [backend.submit(frames(count), 0.5) for _ in range(4)]
            for ticket in tickets:
                backend.collect(ticket)
    cuda.log.clear()
    for number in range(20):
        backend.infer(frames((1, 3, 5)[number % 3], number), 0.5)
    making = ("malloc", "host_alloc", "free", "host_free", "stream", "event", "begin_capture", "execute")
    assert cuda.calls(*making) == []
    assert len(cuda.calls("launch")) == 20


def test_warm_up_leaves_nothing_to_make_for_the_smallest_batch():
    cuda = FakeCuda()
    backend, _ = make(cuda, warm_up=True, slots=2)
    cuda.log.clear()
    given = [frames(1, number) for number in range(6)]
    for ticket, item in [(backend.submit(item, 0.4), item) for item in given]:
        check(backend.collect(ticket), item, 0.4)
    assert cuda.calls("malloc", "host_alloc", "event", "begin_capture", "execute") == []
    assert len(cuda.calls("launch")) == 6


def test_a_graph_is_captured_at_the_second_run_of_each_batch_size_and_replayed():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    kinds = []
    for count in (2, 2, 2, 1, 1, 2):
        cuda.log.clear()
        given = frames(count, len(kinds))
        check(backend.infer(given, 0.5), given, 0.5)
        kinds.append([name for name, _ in cuda.calls("execute", "begin_capture", "end_capture", "launch")])
    captured = ["begin_capture", "execute", "end_capture", "launch"]
    assert kinds == [["execute"], captured, ["launch"], ["execute"], captured, ["launch"]]


def test_results_with_and_without_graph_are_equal():
    with_graph, _ = make(FakeCuda(), cuda_graph=True)
    without, _ = make(FakeCuda(), cuda_graph=False)
    for number in range(4):
        one, other = with_graph.infer(frames(2, number), 0.5), without.infer(frames(2, number), 0.5)
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        np.testing.assert_array_equal(one.mask, other.mask)


def test_growing_memory_drops_graphs_that_know_the_old_addresses():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=2)
    small, large = frames(1), frames(5, 1)
    for _ in range(3):
        tickets = [backend.submit(small, 0.5) for _ in range(2)]
        for ticket in tickets:
            check(backend.collect(ticket), small, 0.5)
    assert cuda.live()["graphs"] == 2
    for _ in range(3):
        check(backend.infer(large, 0.5), large, 0.5)
        tickets = [backend.submit(small, 0.5) for _ in range(2)]
        for ticket in tickets:
            check(backend.collect(ticket), small, 0.5)


@pytest.mark.parametrize("how", ["begin", "execute", "end", "says no"])
def test_where_capture_is_refused_it_runs_without_and_warns_once(how):
    cuda = FakeCuda()

    def change(engine):
        engine.refuse_capture = how == "execute"
        engine.capturable = False if how == "says no" else None

    backend, _ = make(cuda, change=change)
    if how in ("begin", "end"):
        cuda.fail[f"{how}_capture"] = DeviceError("A call to CUDA failed.", "operation not permitted when capturing")
    given = frames(2)
    for _ in range(1 if how == "says no" else 3):  # it is tried three times, from the second run on
        check(backend.infer(given, 0.5), given, 0.5)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph") as caught:
        check(backend.infer(given, 0.5), given, 0.5)
    assert {"execute": "the fake engine refuses", "says no": "cannot be captured"}.get(how, "not permitted") in str(
        caught[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(4):
            check(backend.infer(frames(2, number), 0.5), frames(2, number), 0.5)
    assert cuda.calls("launch") == []
    assert cuda.capturing is None


@pytest.mark.parametrize("how", ["begin_capture", "end_capture"])
def test_one_failed_capture_is_not_the_end_of_graphs(how):
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    cuda.fail[how] = [DeviceError("A call to CUDA failed.", "another thread spoiled it")]
    given = frames(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            check(backend.infer(given, 0.5), given, 0.5)
    assert len(cuda.calls("launch")) == 3  # the first settles, the second fails to capture
    assert backend.cuda_graph


def test_a_malformed_frame_waits_for_no_stream():
    # Another thread may be capturing one: a wait would spoil it.
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=2)
    check(backend.infer(frames(2), 0.5), frames(2), 0.5)
    cuda.log.clear()
    for bad in (frames(2)[:, :4], frames(2).astype(np.float32), frames(9), "x", FakeArray(cuda, frames(2)[:, :3])):
        with pytest.raises(FrameError):
            backend.infer(bad, 0.5)
    assert cuda.calls("synchronize", "synchronize_device", "wait_host") == []
    check(backend.infer(frames(2), 0.5), frames(2), 0.5)


def test_a_failure_under_way_waits_under_the_lock():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=2)
    cuda.fail["copy_out"] = [DeviceError("A call to CUDA failed.")]
    original, held = cuda.synchronize, []

    def synchronize(stream):
        held.append(backend._enqueue_lock._is_owned())
        original(stream)

    cuda.synchronize = synchronize
    with pytest.raises(DeviceError):
        backend.infer(frames(1), 0.5)
    assert held
    assert all(held)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)


def test_a_largest_batch_that_was_named_is_ready_when_it_comes():
    cuda = FakeCuda()
    backend, engine = make(cuda, profile=(1, 2, 8), slots=2, max_batch=4, warm_up=True)
    cuda.log.clear()
    contexts = len(engine.contexts)
    for count in (4, 1, 4):
        check(backend.infer(frames(count), 0.5), frames(count), 0.5)
    assert cuda.calls("malloc", "host_alloc", "begin_capture", "destroy_graph", "execute") == []
    assert len(cuda.calls("launch")) == 3
    assert len(engine.contexts) == contexts


def test_no_answer_on_the_memory_that_is_needed_is_an_error():
    class Silent(FakeContext):
        def update_device_memory_size_for_shapes(self):
            return 0

    def change(engine):
        engine.device_memory_size_v2 = 4096
        engine.create_execution_context = lambda strategy: Silent(engine)

    backend, _ = make(FakeCuda(), change=change)
    with pytest.raises(DeviceError, match="memory that a batch of 2 needs"):
        backend.infer(frames(2), 0.5)


def test_more_batch_sizes_than_are_kept_still_work_and_memory_stays_flat():
    cuda = FakeCuda()
    backend, engine = make(cuda, profile=(1, 4, 20), slots=1)
    for _ in range(2):
        for count in (20, *range(1, 20)):
            given = frames(count, count)
            check(backend.infer(given, 0.5), given, 0.5)
    made, live = len(engine.contexts), cuda.live()
    for count in range(1, 21):
        check(backend.infer(frames(count), 0.5), frames(count), 0.5)
    assert len(engine.contexts) == made <= 9
    assert cuda.live() == live


def test_the_threshold_is_copied_only_when_it_changes():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    given = frames(1)
    for threshold, copies in ((0.5, 2), (0.5, 1), (0.2, 2), (0.2, 1)):
        cuda.log.clear()
        check(backend.infer(given, threshold), given, threshold)
        assert len(cuda.calls("copy_in")) == copies


# -- threads, several engines, closing


def test_many_threads_may_call_one_backend():
    backend, _ = make(FakeCudaForThreads(), slots=2)
    errors = []

    def work(number):
        try:
            for turn in range(8):
                given = frames(1 + (number + turn) % 3, number * 100 + turn)
                check(backend.infer(given, 0.4), given, 0.4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    backend.close()


def test_threads_that_hold_all_slots_do_not_wait_for_each_other():
    backend, _ = make(FakeCuda(), slots=2)
    one = [backend.submit(frames(1, number), 0.5) for number in range(2)]  # all slots
    two = [backend.submit(frames(1, number), 0.5) for number in range(2, 4)]
    check(backend.infer(frames(1, 9), 0.5), frames(1, 9), 0.5)
    for number, ticket in reversed(list(enumerate(two, 2))):
        check(backend.collect(ticket), frames(1, number), 0.5)
    for number, ticket in enumerate(one):
        check(backend.collect(ticket), frames(1, number), 0.5)


def test_the_callers_device_is_put_back():
    cuda = FakeCuda(devices=("sm89", "sm89"))
    cuda.current = 1
    backend, _ = make(cuda)
    backend.infer(frames(1), 0.5)
    assert cuda.current == 1
