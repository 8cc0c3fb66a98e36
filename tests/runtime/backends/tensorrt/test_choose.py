"""Which engine of a bundle runs here, and what is said where none does."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_backend import SIZE, FakeCudaForThreads, check, frames
from fake_cuda import FakeArray, FakeCuda, expected_map, fake_tensorrt
from tiny_bundle import tiny_manifest

from saae_runtime.backends.cuda.jetson import Jetson, find_jetson
from saae_runtime.backends.tensorrt import choose as backend_module
from saae_runtime.backends.tensorrt import library as trt_library
from saae_runtime.backends.tensorrt.library import (
    TrtLibrary,
    install_hint,
    library_name,
    load_library,
    sm_problem,
    version_problem,
)
from saae_runtime.bundle import write_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import (
    BackendUnavailableError,
    BundleCorruptError,
    ConfigError,
    DeviceError,
    EngineIncompatibleError,
)
from saae_runtime.manifest import Artefact, Parity, Profile

# -- which engine runs here


def artefact(**changes):
    made = Artefact(
        "tensorrt-10.3-sm89-fp16.engine",
        "engine",
        "fp16",
        library="tensorrt",
        library_version="10.3.0",
        sm="sm89",
        profile=Profile(1, 2, 5),
    )
    return replace(made, **changes)


COMPATIBLE = {"version_compatible": True}


@pytest.mark.parametrize(
    ("changes", "flavour", "version", "runs"),
    [
        ({}, "tensorrt", "10.3.0", True),
        ({}, "tensorrt", "10.3.0.30", True),  # JetPack's build number: what both say is equal
        ({"library_version": "10.16.1.11"}, "tensorrt", "10.16.0.72", False),
        ({}, "tensorrt", "10.4.0", False),
        ({"options": COMPATIBLE}, "tensorrt", "10.4.0", True),
        ({"options": COMPATIBLE}, "tensorrt", "10.2.0", False),
        ({"options": COMPATIBLE}, "tensorrt", "11.4.0.106", True),
        ({"options": COMPATIBLE}, "tensorrt_lean", "10.13.2.6", True),
        ({}, "tensorrt_lean", "10.3.0", False),
        ({"library_version": "11.0.0", "options": COMPATIBLE}, "tensorrt", "10.16.0", False),
        ({}, "tensorrt_rtx", "10.3.0", False),
        ({"library": "tensorrt_rtx", "library_version": "1.7.1.116"}, "tensorrt_rtx", "1.7.1.116", True),
        ({"library": "tensorrt_rtx", "library_version": "1.7.1.116"}, "tensorrt_rtx", "1.6.1.120", False),
        ({"library_version": None}, "tensorrt", "10.3.0", False),
    ],
)
def test_which_versions_run_which_engines(changes, flavour, version, runs):
    problem = version_problem(artefact(**changes), flavour, version)
    assert (problem is None) == runs
    if problem is not None:
        assert version in problem or "--version-compatible" in problem


@pytest.mark.parametrize(
    ("changes", "sm", "runs"),
    [
        ({}, "sm89", True),
        ({}, "sm87", False),
        ({"sm": "sm86+sm89+sm120"}, "sm120", True),
        ({"sm": "sm86+sm89+sm120"}, "sm12", False),
        ({"sm": None}, "sm75", True),
        ({"sm": "sm80", "options": {"hardware_compatible": "ampere_plus"}}, "sm89", True),
        ({"sm": "sm80", "options": {"hardware_compatible": "ampere_plus"}}, "sm75", False),
    ],
)
def test_which_gpus_run_which_engines(changes, sm, runs):
    problem = sm_problem(artefact(**changes), sm)
    assert (problem is None) == runs
    assert runs or sm in problem


def test_names_of_libraries():
    assert library_name("TensorRT-RTX") == "tensorrt_rtx"
    with pytest.raises(ConfigError, match="tensorrt_lean"):
        library_name("tensort")


@pytest.fixture
def engine_bundle(tmp_path):
    """A bundle whose only engine is b"engine", which the fake TensorRT takes."""

    def build(data=b"engine", **changes):
        engines = (artefact(**changes),)
        manifest = tiny_manifest(size=SIZE, precisions=("fp16",))
        manifest = replace(manifest, artefacts=engines)
        return write_bundle(tmp_path / "bundle", manifest, {engine.file: data for engine in engines})

    return build


@pytest.fixture
def fake_gpu(monkeypatch):
    """The fake CUDA and TensorRT in the places that import them."""
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt", fake_tensorrt(cuda, size=SIZE))
    monkeypatch.setitem(trt_library._loaded, "tensorrt", library)
    monkeypatch.setattr(backend_module, "CudaApi", lambda: cuda)
    return cuda


def test_an_engine_of_the_bundle_is_opened_and_runs(engine_bundle, fake_gpu):
    bundle = engine_bundle()
    backend = backend_module.open_backend(bundle, "tensorrt")
    check(backend.infer(frames(2), 0.5), frames(2), 0.5)
    assert (backend.precision, backend.frame_size, backend.max_batch) == ("fp16", SIZE, 5)
    assert "sm89" in backend.description
    backend.close()
    found = {candidate.name: candidate for candidate in backend_module.candidates(bundle)}
    assert found["tensorrt"].why_not is None
    assert found["tensorrt_rtx"].why_not
    assert "--library tensorrt-rtx" in found["tensorrt_rtx"].cure


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"sm": "sm87"}, ("sm87", "sm89")),
        ({"library_version": "10.9.0"}, ("10.9.0", "10.3.0")),
    ],
)
def test_an_engine_for_another_gpu_or_version_names_both_and_the_command(engine_bundle, fake_gpu, changes, sides):
    bundle = engine_bundle(**changes)
    with pytest.raises(EngineIncompatibleError) as caught:
        backend_module.open_backend(bundle, "tensorrt")
    for side in sides:
        assert side in str(caught.value)
    assert caught.value.cure.startswith("saae-export engine ")
    assert "--library tensorrt " in caught.value.cure
    assert fake_gpu.calls("malloc", "stream", "event") == []  # nothing was made on the GPU
    (candidate,) = [item for item in backend_module.candidates(bundle) if item.name == "tensorrt"]
    assert all(side in candidate.why_not for side in sides)
    assert candidate.cure == caught.value.cure


def test_an_engine_over_the_bundle_takes_frames_from_host_and_gpu_and_streams(engine_bundle, monkeypatch):
    cuda = FakeCudaForThreads(seed=5)
    monkeypatch.setitem(trt_library._loaded, "tensorrt", TrtLibrary("tensorrt", fake_tensorrt(cuda, size=SIZE)))
    monkeypatch.setattr(backend_module, "CudaApi", lambda: cuda)
    given = frames(12)
    with Engine(engine_bundle(), backend="tensorrt", threshold=0.6, image_threshold=0.6) as engine:
        assert engine.backend.precision == "fp16"
        for number, result in enumerate(engine(given)):  # 12 frames, 5 at a time
            np.testing.assert_array_equal(result.anomaly_map, expected_map(given[number]))
            np.testing.assert_array_equal(result.mask, expected_map(given[number]) > np.float32(0.6))
        streamed = list(engine.stream(given, batch_size=2))
        assert [result.score for result in streamed] == [result.score for result in engine(given)]
        one = engine(FakeArray(cuda, given[3]))
        several = engine(FakeArray(cuda, given[:4]))
        np.testing.assert_array_equal(one.anomaly_map, several[3].anomaly_map)
        np.testing.assert_array_equal(one.anomaly_map, expected_map(given[3]))
    assert {kind: count for kind, count in cuda.live().items() if count} == {}


def test_the_version_is_compared_before_the_driver_is_asked(engine_bundle, fake_gpu):
    fake_gpu.driver = (0, 0)
    with pytest.raises(EngineIncompatibleError):
        backend_module.open_backend(engine_bundle(library_version="10.9.0"), "tensorrt")
    with pytest.raises(DeviceError, match="No NVIDIA driver"):
        backend_module.open_backend(engine_bundle(), "tensorrt")


def test_no_such_gpu(engine_bundle, fake_gpu):
    with pytest.raises(DeviceError, match="GPU 3"):
        backend_module.open_backend(engine_bundle(), "tensorrt", device=3)


def test_an_engine_that_was_changed_on_disk_is_not_deserialized(engine_bundle, fake_gpu):
    bundle = engine_bundle()
    bundle.file("tensorrt-10.3-sm89-fp16.engine").write_bytes(b"Engine")
    with pytest.raises(BundleCorruptError, match="changed"):
        backend_module.open_backend(bundle, "tensorrt")
    assert trt_library._loaded["tensorrt"].module.made == []


def test_an_engine_that_tensorrt_does_not_take_says_why(engine_bundle, fake_gpu):
    with pytest.raises(EngineIncompatibleError) as caught:
        backend_module.open_backend(engine_bundle(data=b"something else"), "tensorrt")
    assert "magic tag" in caught.value.why
    assert "saae-export engine" in caught.value.cure


def test_an_engine_that_does_not_fit_into_memory(engine_bundle, fake_gpu):
    with pytest.raises(DeviceError, match="out of memory") as caught:
        backend_module.open_backend(engine_bundle(data=b"huge"), "tensorrt")
    assert caught.value.cure
    assert set(fake_gpu.live().values()) == {0}


def test_a_bundle_without_engines_names_the_command(engine_bundle, fake_gpu):
    with pytest.raises(BackendUnavailableError, match="no engine for TensorRT for RTX") as caught:
        backend_module.open_backend(engine_bundle(), "tensorrt_rtx")
    assert "--library tensorrt-rtx" in caught.value.cure


def test_an_engine_that_failed_does_not_hide_a_good_one(tmp_path, fake_gpu):
    failed = Parity(1, 1.0, 1.0, 3, 0.01, 0.01, False, "one.png", "PyTorch FP32")
    engines = (artefact(parity=failed), artefact(file="good.engine", precision="fp32"))
    manifest = replace(tiny_manifest(size=SIZE, precisions=("fp32", "fp16")), artefacts=engines)
    bundle = write_bundle(tmp_path / "two", manifest, {engine.file: b"engine" for engine in engines})
    (candidate,) = [item for item in backend_module.candidates(bundle) if item.name == "tensorrt"]
    assert candidate.artefact.file == "good.engine"
    for precision, opened in ((None, "fp32"), ("fp16", "fp16")):  # the one that failed only where it is asked for
        backend = backend_module.open_backend(bundle, "tensorrt", precision=precision)
        assert backend.precision == opened
        backend.close()


@pytest.mark.parametrize(
    ("held", "asked", "named"),
    [
        (("fp32", "fp16"), None, "fp16"),
        (("fp32", "bf16"), None, "fp32"),
        (("fp32", "bf16"), "bf16", "fp32"),
        (("fp32", "fp16"), "fp32", "fp32"),
    ],
)
def test_the_command_names_a_precision_whose_graph_the_bundle_has(tmp_path, held, asked, named):
    manifest = tiny_manifest(size=SIZE, precisions=held)
    bundle = write_bundle(tmp_path / "graphs", manifest, {item.file: b"graph" for item in manifest.artefacts})
    with pytest.raises(BackendUnavailableError) as caught:
        backend_module.open_backend(bundle, "tensorrt", precision=asked)
    assert f"--precision {named}" in caught.value.cure


def test_a_library_that_is_not_installed_names_the_pip_line(engine_bundle, monkeypatch):
    monkeypatch.setattr(trt_library, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match="TensorRT cannot be used") as caught:
        backend_module.open_backend(engine_bundle(), "tensorrt")
    assert "pip install" in caught.value.cure


def test_candidates_never_raise(engine_bundle):
    for candidate in backend_module.candidates(engine_bundle(), device=7):
        assert candidate.why_not
        assert candidate.cure


# -- where it runs


def test_a_jetson_is_known_by_its_release_file_and_model(tmp_path):
    assert find_jetson(tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    assert find_jetson(tmp_path) == Jetson("NVIDIA Jetson Orin Nano Developer Kit", "")
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan 8 2025\n"
    (tmp_path / "etc/nv_tegra_release").write_text(release)
    found = find_jetson(tmp_path)
    assert (found.l4t, found.jetpack) == ("36.4.3", "6")
    assert "Jetson Linux 36.4.3" in str(found)
    (tmp_path / "proc/device-tree/model").unlink()  # as in many containers
    assert find_jetson(tmp_path).jetpack == "6"


def test_install_hints_differ_on_a_jetson():
    orin = Jetson("NVIDIA Jetson AGX Orin", "36.4.3")
    assert "--system-site-packages" in install_hint("tensorrt", orin)
    assert "not offered" in install_hint("tensorrt_rtx", orin)


@pytest.mark.needs("tensorrt_rtx")
def test_the_wheels_cuda_version_is_known():
    assert load_library("tensorrt_rtx").cuda_major() in (12, 13, 14)


def test_code_inside_an_engine_is_allowed_only_where_the_manifest_says_that_there_is_some(engine_bundle, fake_gpu):
    library = trt_library._loaded["tensorrt"]
    for options, allowed in (({"version_compatible": True}, True), ({}, False)):
        backend_module.open_backend(engine_bundle(options=options), "tensorrt").close()
        assert library._runtime.engine_host_code_allowed is allowed


def test_activation_memory_is_given_in_the_way_that_the_release_has():
    class Old:
        device_memory = None

    old = Old()
    TrtLibrary.give_memory(old, 512, 1024)
    assert old.device_memory == 512


@pytest.mark.needs("tensorrt_rtx")
def test_one_logger_serves_a_process():
    assert load_library("tensorrt-rtx") is load_library("tensorrt_rtx")
