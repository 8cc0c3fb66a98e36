"""Kernels that TensorRT for RTX compiles at run time: compiled once for all slots, kept for the next process."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from fake_backend import SIZE, check, frames, make
from fake_cuda import FakeCuda
from fake_rtx import FakeRuntimeCache, FakeRuntimeConfig, RtxEngine, fake_tensorrt_rtx
from needs import need
from tiny_bundle import tiny_manifest

from saae_runtime.backends.base import BackendOptions
from saae_runtime.backends.cache import cache_folder
from saae_runtime.backends.tensorrt import choose as backend_module
from saae_runtime.backends.tensorrt import library as trt_library
from saae_runtime.backends.tensorrt.kernels import kernel_file
from saae_runtime.backends.tensorrt.library import TrtLibrary
from saae_runtime.bundle import write_bundle
from saae_runtime.manifest import Artefact, Profile

FILE = "tensorrt_rtx-1.7-sm89-fp16.engine"


@pytest.fixture
def rtx(monkeypatch):
    """The fake GPU and the fake library in the places that import them; gives the list of engines made."""
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt_rtx", fake_tensorrt_rtx(cuda, size=SIZE))
    monkeypatch.setitem(trt_library._loaded, "tensorrt_rtx", library)
    monkeypatch.setattr(backend_module, "CudaApi", lambda: cuda)
    return library.module.made


@pytest.fixture
def bundle(tmp_path):
    manifest = tiny_manifest(size=SIZE, precisions=("fp16",))
    engine = Artefact(
        FILE, "engine", "fp16", library="tensorrt_rtx", library_version="1.7.1", sm="sm89", profile=Profile(1, 2, 5)
    )
    return write_bundle(tmp_path / "bundle", replace(manifest, artefacts=(engine,)), {FILE: b"engine"})


def start(bundle, **options):
    return backend_module.open_backend(bundle, "tensorrt_rtx", options=BackendOptions(**options))


def file_of(bundle):
    return cache_folder(bundle, None) / kernel_file(FILE, "Fake GPU")


def test_one_batch_size_is_compiled_once_for_all_slots(bundle, rtx):
    backend = start(bundle, slots=3, cache=False)
    assert rtx[0].compiled == [1]
    check(backend.infer(frames(2), 0.5), frames(2), 0.5)
    tickets = [backend.submit(frames(2), 0.5) for _ in range(3)]
    for ticket in tickets:
        backend.collect(ticket)
    assert rtx[0].compiled == [1, 2]
    backend.close()
    assert not bundle.path.with_name("bundle.cache").exists()


def test_the_next_process_compiles_nothing(bundle, rtx):
    start(bundle).close()
    assert file_of(bundle).name == "tensorrt_rtx-1.7-sm89-fp16-fake-gpu.kernels"
    assert set(bundle.manifest.files) == {FILE}  # beside the bundle and not in it
    backend = start(bundle)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)
    assert [engine.compiled for engine in rtx] == [[1], []]
    backend.close()


def test_kernels_are_kept_before_a_process_is_killed_and_again_at_the_end(bundle, rtx):
    backend = start(bundle)
    first = file_of(bundle).read_bytes()  # nothing was closed yet
    backend.infer(frames(4), 0.5)
    assert file_of(bundle).read_bytes() == first
    del backend
    gc.collect()
    assert file_of(bundle).read_bytes() != first
    second = start(bundle)
    second.infer(frames(4), 0.5)
    assert rtx[-1].compiled == []
    written = file_of(bundle).stat().st_mtime_ns
    second.close()
    assert file_of(bundle).stat().st_mtime_ns == written  # nothing new, nothing written


@pytest.mark.parametrize("data", [b"", b"cut off", b'["1.6.0", [1]]'])
def test_kernels_that_do_not_fit_are_compiled_and_written_anew(bundle, rtx, data):
    file_of(bundle).write_bytes(data)
    backend = start(bundle)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)
    assert rtx[0].compiled == [1]
    assert trt_library._loaded["tensorrt_rtx"].take_messages() == []  # no stale word in a later error
    backend.close()
    start(bundle).close()
    assert rtx[1].compiled == []


def test_a_folder_that_cannot_be_written_to_is_no_error(bundle, rtx):
    file_of(bundle).mkdir()
    backend = start(bundle)
    check(backend.infer(frames(1), 0.5), frames(1), 0.5)
    backend.close()
    assert rtx[0].compiled == [1]


def test_standard_tensorrt_keeps_nothing(tmp_path):
    backend, engine = make(FakeCuda(), warm_up=True)
    assert backend._kernels.handle is None
    backend.close()
    assert not hasattr(engine, "compiled")


def test_the_fake_has_what_the_installed_library_has():
    module = need("tensorrt_rtx")
    for fake, real in (
        (FakeRuntimeCache, module.IRuntimeCache),
        (FakeRuntimeConfig, module.IRuntimeConfig),
        (RtxEngine, module.ICudaEngine),
    ):
        called = [name for name in vars(fake) if not name.startswith("_") and callable(getattr(fake, name))]
        assert called
        for name in called:
            assert hasattr(real, name), f"{real.__name__} has no {name}"
    assert hasattr(module.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(module.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert TrtLibrary("tensorrt_rtx", module).compiles_when_running
