"""A TensorRT backend that fails, is forgotten, or closes: everything it took is given back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
from fake_backend import check, frames, make
from fake_cuda import FakeCuda, out_of_memory

from saae_runtime.errors import (
    BackendError,
    DeviceError,
    EngineIncompatibleError,
)


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


def test_outputs_that_are_collected_while_a_slot_is_taken_hold_nobody_up():
    """Outputs in a cycle, as a traceback makes one, are given back on whatever thread the collector runs."""
    backend, _ = make(FakeCuda())
    holder = [backend.infer_on_device(frames(1), 0.5)]
    holder.append(holder)
    del holder

    class Collecting(type(backend._free)):
        def __bool__(self):
            gc.collect()
            return len(self) > 0

    backend._free = Collecting(backend._free)
    answered = threading.Event()
    threading.Thread(target=lambda: (backend.infer(frames(1), 0.5), answered.set()), daemon=True).start()
    assert answered.wait(30)
    backend.close()


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
