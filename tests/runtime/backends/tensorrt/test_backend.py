"""The TensorRT backend against a fake CUDA that really orders the work, and its errors in flight."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
from fake_backend import SIZE, FakeCudaForThreads, check, frames, make
from fake_cuda import FakeArray, FakeCuda, expected_map, out_of_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import (
    BackendError,
    DeviceError,
    EngineIncompatibleError,
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


def test_two_backends_share_a_process_and_one_closes_alone():
    cuda = FakeCuda()
    one, _ = make(cuda)
    other, _ = make(cuda)
    one.infer(frames(1), 0.5)
    other.infer(frames(1), 0.5)
    one.close()
    one.close()
    with pytest.raises(BackendError, match="closed"):
        one.infer(frames(1), 0.5)
    check(other.infer(frames(1), 0.5), frames(1), 0.5)
    other.close()
    assert set(cuda.live().values()) == {0}


def test_a_forgotten_backend_gives_everything_back():
    cuda = FakeCuda()
    backend, engine = make(cuda)
    backend.infer(frames(1), 0.5)
    engine.contexts.clear()
    del backend
    gc.collect()
    assert set(cuda.live().values()) == {0}


def test_at_interpreter_exit_everything_is_released_in_order(repo_root):
    script = """
import sys
sys.path[:0] = [{support!r}, {root!r}]
from fake_backend import frames, make
from fake_cuda import FakeCuda
class Loud(FakeCuda):
    def destroy_stream(self, stream):
        super().destroy_stream(stream)
        print("stream", flush=True)
    def free(self, pointer):
        super().free(pointer)
        print("memory", flush=True)
backend, _ = make(Loud())
backend.infer(frames(1), 0.5)
print("end", flush=True)
"""
    code = script.format(support=str(repo_root / "tests" / "support"), root=str(repo_root))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=repo_root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["end", "memory", "memory", *["stream"] * 4]


# -- failures


def test_out_of_memory_at_the_start_gives_back_what_was_taken():
    for skip in range(3):
        cuda = FakeCuda()
        cuda.fail["malloc"] = [None] * skip + [out_of_memory()]
        if skip == 2:
            cuda.fail = {"host_alloc": out_of_memory()}
        with pytest.raises(DeviceError, match="out of memory"):
            make(cuda, warm_up=True)
        assert set(cuda.live().values()) == {0}


def test_out_of_memory_while_growing_leaves_the_backend_usable():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)
    cuda.fail["malloc"] = out_of_memory()
    with pytest.raises(DeviceError, match="out of memory"):
        backend.infer(frames(4), 0.5)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)
    cuda.fail.clear()
    check(backend.infer(frames(4), 0.5), frames(4), 0.5)


def test_a_run_that_does_not_start_says_what_tensorrt_said_and_frees_the_slot():
    backend, engine = make(FakeCuda(), slots=1)
    engine.refuse = True
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"fake\.engine failed") as caught:
            backend.infer(frames(1), 0.5)
        assert "the fake engine refuses" in caught.value.why
    engine.refuse = False
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)


def test_a_device_that_fails_while_waiting_frees_the_slot():
    cuda = FakeCuda()
    backend, _ = make(cuda, slots=1)
    cuda.fail["wait_host"] = [DeviceError("an illegal memory access was encountered")]
    with pytest.raises(DeviceError, match="illegal"):
        backend.infer(frames(1), 0.5)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)


@pytest.mark.parametrize("dtypes", [{"frame": "float32"}, {"mask": "bool"}, {"anomaly_map": "float16"}])
def test_an_engine_of_another_graph_is_named(dtypes):
    cuda = FakeCuda()

    def change(engine):
        for name, dtype in dtypes.items():
            shape, _, is_input = engine._tensors[name]
            engine._tensors[name] = (shape, dtype, is_input)

    with pytest.raises(EngineIncompatibleError, match=next(iter(dtypes))):
        make(cuda, change=change)


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
