"""Frames, a backend on the fake GPU and what it must answer: shared by the tests of the TensorRT backend."""

from __future__ import annotations

import threading

import numpy as np
from fake_cuda import FakeCuda, expected_map, fake_tensorrt

from saae_runtime.backends.base import BackendOptions
from saae_runtime.backends.cuda.api import GpuInfo
from saae_runtime.backends.tensorrt.backend import TensorRTBackend
from saae_runtime.backends.tensorrt.library import (
    TrtLibrary,
)

SIZE = (8, 16)


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), np.uint8)


def check(outputs, given, threshold):
    wanted = expected_map(given)
    np.testing.assert_array_equal(outputs.anomaly_map, wanted)
    np.testing.assert_array_equal(outputs.score, wanted.max((1, 2)))
    np.testing.assert_array_equal(outputs.mask, wanted > np.float32(threshold))
    assert outputs.mask.dtype == np.bool_


def make(cuda, *, profile=(1, 2, 5), change=None, **options):
    """A backend on the fake GPU; returns it and the fake engine under it."""
    module = fake_tensorrt(cuda, profile=profile, change=change, size=SIZE)
    library = TrtLibrary("tensorrt", module)
    engine = library.deserialize(b"engine", host_code=False)
    options.setdefault("warm_up", False)
    backend = TensorRTBackend(
        name="tensorrt",
        library=library,
        engine=engine,
        api=cuda,
        gpu=GpuInfo(0, "Fake GPU", "sm89", 8 << 30, False),
        precision="fp16",
        frame_size=SIZE,
        options=BackendOptions(**options),
        label="fake.engine",
    )
    return backend, engine


class FakeCudaForThreads(FakeCuda):
    """The fake with one lock around each call, as the CUDA runtime is safe to call from several threads."""

    def __init__(self, **options):
        object.__setattr__(self, "_lock", threading.RLock())
        super().__init__(**options)

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or name == "on" or not callable(found):
            return found
        lock = super().__getattribute__("_lock")

        def guarded(*arguments, **options):
            with lock:
                return found(*arguments, **options)

        return guarded
