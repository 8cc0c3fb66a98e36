"""OpenVINO through ONNX Runtime: run for real where the plug-in is installed, its settings checked everywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from needs import need
from tiny_bundle import expected_map, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine
from saae_runtime.backends import BackendOptions
from saae_runtime.backends.onnxruntime import openvino as ort_openvino
from saae_runtime.backends.onnxruntime.backend import OrtBackend
from saae_runtime.backends.onnxruntime.openvino import PROVIDER, add_device, missing, plugin_config
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendError, BackendUnavailableError
from saae_runtime.manifest import Thresholds
from saae_runtime.thresholds import ThresholdTable

SIZE = (32, 48)
NAME = "onnxruntime:openvino"


class FakeRuntime:
    """ONNX Runtime as the plug-in shows it, with the devices that a test names."""

    __version__ = "1.30.0"

    def __init__(self, devices: dict[str, str], failure: Exception | None = None) -> None:
        self.devices = [
            SimpleNamespace(
                ep_name=PROVIDER,
                ep_metadata={"ov_device": name, "OPTIMIZATION_CAPABILITIES": able, "FULL_DEVICE_NAME": f"some {name}"},
            )
            for name, able in devices.items()
        ]
        self.failure = failure

    def get_ep_devices(self) -> list[SimpleNamespace]:
        return self.devices

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.failure:
            raise self.failure


class FakeSettings:
    def __init__(self) -> None:
        self.config: dict[str, dict[str, str]] = {}
        self.entries: dict[str, str] = {}
        self.devices: list[SimpleNamespace] = []

    def add_provider_for_devices(self, devices: list, options: dict[str, str]) -> None:
        self.devices = devices
        self.config = json.loads(options["load_config"])

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@pytest.mark.parametrize(
    ("device", "able", "precision", "asked", "expected"),
    [
        ("CPU", "FP32 FP16 INT8 BF16", "fp32", None, "f32"),
        ("CPU", "FP32 FP16 INT8 BF16", "fp16", None, "f32"),
        ("CPU", "FP32 FP16 INT8 BF16", "bf16", None, "bf16"),
        ("CPU", "FP32 INT8", "fp32", None, "f32"),
        ("CPU", "", "fp32", None, "f32"),
        ("GPU.0", "FP32 FP16 INT8", "fp32", None, "f32"),
        ("GPU.0", "FP32 FP16 INT8", "fp16", None, "f16"),
        ("NPU", "FP16 INT8", "fp16", None, "f16"),
        ("CPU", "FP32 FP16 INT8 BF16", "fp32", "bf16", "bf16"),
        ("CPU", "FP32 INT8", "fp32", "f32", "f32"),
    ],
)
def test_arithmetic_is_the_calibrated_one_unless_asked(
    device: str, able: str, precision: str, asked: str | None, expected: str
) -> None:
    kind = device.partition(".")[0]
    settings = FakeSettings()
    options = BackendOptions(device_type=kind, arithmetic=asked, threads=3)
    words = add_device(FakeRuntime({device: able}), settings, options, precision, None)
    assert ("thresholds were calibrated" in words) == (asked is not None and asked != "f32")
    assert settings.config[kind]["INFERENCE_PRECISION_HINT"] == expected
    assert settings.config[kind]["PERFORMANCE_HINT"] == "LATENCY"
    assert ("INFERENCE_NUM_THREADS" in settings.config[kind]) == (kind == "CPU")
    assert settings.entries["session.disable_cpu_ep_fallback"] == "1"
    assert expected in words


def test_the_first_of_several_gpus_and_only_the_plain_devices() -> None:
    runtime = FakeRuntime({"CPU": "FP32", "GPU.0": "FP32 FP16", "GPU.1": "FP32 FP16"})
    settings = FakeSettings()
    add_device(runtime, settings, BackendOptions(device_type="GPU"), "fp32", None)
    assert settings.devices[0].ep_metadata["ov_device"] == "GPU.0"


def test_arithmetic_that_the_device_has_not() -> None:
    with pytest.raises(BackendUnavailableError, match="does not compute in bf16") as caught:
        add_device(FakeRuntime({"CPU": "FP32 INT8"}), FakeSettings(), BackendOptions(arithmetic="bf16"), "fp32", None)
    assert "f32" in caught.value.cure


def test_no_other_arithmetic_behind_your_back() -> None:
    options = BackendOptions(device_type="NPU")
    with pytest.raises(BackendUnavailableError, match="does not compute in f32") as caught:
        add_device(FakeRuntime({"NPU": "FP16 INT8"}), FakeSettings(), options, "fp32", None)
    assert "calibrated in f32" in caught.value.why
    assert "arithmetic='f16'" in caught.value.cure


def test_device_that_is_not_there() -> None:
    with pytest.raises(BackendUnavailableError, match="no NPU device") as caught:
        add_device(FakeRuntime({"CPU": "FP32"}), FakeSettings(), BackendOptions(device_type="NPU"), "fp32", None)
    assert "CPU" in caught.value.why


def test_plug_in_for_another_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(get_library_path=lambda: "/nowhere/plugin.so")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_openvino", package)
    runtime = FakeRuntime({}, RuntimeError("requires API version 27"))
    with pytest.raises(BackendUnavailableError, match="API version 27") as caught:
        add_device(runtime, FakeSettings(), BackendOptions(), "fp32", None)
    assert "pip install --upgrade" in caught.value.cure


def test_the_second_open_says_what_the_first_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime refuses a library that it has registered before, with an error that is beside the point."""

    class RegistersOnce(FakeRuntime):
        def register_execution_provider_library(self, name: str, path: str) -> None:
            if hasattr(self, "name"):
                raise RuntimeError("EP library is already registered")
            self.name = name

    package = SimpleNamespace(get_library_path=lambda: "/somewhere/plugin.so")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_openvino", package)
    monkeypatch.setattr("saae_runtime.backends.onnxruntime.openvino.find_spec", lambda _: object())
    runtime = RegistersOnce({})
    said = []
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="no CPU device here") as caught:
            add_device(runtime, FakeSettings(), BackendOptions(), "fp32", None)
        said.append(str(caught.value))
        assert "Intel processors alone" in missing(runtime)[0]
    assert said[0] == said[1]
    assert not ort_openvino.has_bf16(runtime)


def test_too_old_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saae_runtime.backends.onnxruntime.openvino.find_spec", lambda _: object())
    why, cure = missing(SimpleNamespace(__version__="1.18.0"))
    assert "1.18.0" in why
    assert "upgrade" in cure


def test_plugin_config() -> None:
    options = BackendOptions(hint="throughput", threads=2)
    assert plugin_config("CPU", "f32", options, Path("/c")) == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": "2",
        "CACHE_DIR": "/c",
    }


def need_openvino() -> None:
    """Skips where OpenVINO has no CPU device, and says why: asked of the library, not of what is installed."""
    ort = need("onnxruntime")
    why, _ = missing(ort)
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_openvino()
    return make_tiny_bundle(tmp_path_factory.mktemp("openvino") / "tiny", SIZE, precisions=("fp32", "fp16"))


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_auto_takes_openvino_where_it_is(folder: Path) -> None:
    with Engine(folder, backend="onnxruntime") as engine:
        if engine.backend.name == "onnxruntime:cuda":
            pytest.skip("this machine has CUDA, which auto rightly takes")
        assert engine.backend.name == NAME
        assert "* onnxruntime:openvino: in use" in engine.explain()
        assert "onnxruntime:cpu: works, slower" in engine.explain()


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_openvino_equals_numpy(folder: Path, hint: str) -> None:
    with Engine(folder, backend=NAME, precision="fp32", hint=hint, threads=1) as engine:
        assert "f32" in engine.backend.description
        for batch in (1, 3, 11):
            frames = noise(batch, batch, *SIZE, 3)
            for frame, result in zip(frames, engine(frames, threshold=62.0), strict=True):
                np.testing.assert_allclose(result.anomaly_map, expected_map(frame), rtol=1e-5, atol=1e-3)
                np.testing.assert_array_equal(result.mask, result.anomaly_map > 62.0)


def test_single_frames_have_a_session_of_fixed_shape_and_batches_one_of_their_own(folder: Path) -> None:
    frames = noise(3, 5, *SIZE, 3)
    with Engine(folder, backend=NAME, precision="fp32", threads=1) as engine:
        backend = engine.backend
        assert isinstance(backend, OrtBackend)
        assert backend._session.get_inputs()[0].shape[0] == 1
        assert backend._batches is not None
        alone = [engine(frame).score for frame in frames]
        assert backend._batches._session is None  # no memory for what nobody uses
        assert [result.score for result in engine(frames)] == pytest.approx(alone, rel=1e-6)
        assert backend._batches._session is not None
    with Engine(folder, backend=NAME, precision="fp32", threads=1, max_batch=3) as engine:
        assert isinstance(engine.backend, OrtBackend)
        assert engine.backend._batches is not None
        assert engine.backend._batches._session is not None  # batches were announced: nobody waits for it later
    with Engine(folder, backend=NAME, precision="fp32", threads=1, max_batch=1) as engine:
        assert [result.score for result in engine(frames)] == alone


def test_a_bundle_that_was_replaced_while_it_was_in_use(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "line"
    shutil.copytree(folder, place)
    with Engine(place, backend=NAME, precision="fp32", threads=1) as engine:
        frames = noise(3, 2, *SIZE, 3)
        score = engine(frames[0]).score
        model = place / "model.onnx"
        model.write_bytes(model.read_bytes() + b"\x00")
        for _ in range(2):
            with pytest.raises(BackendError, match="another file than when") as caught:
                engine(frames)
            assert "open the new bundle" in caught.value.cure
        assert engine(frames[0]).score == score


def test_openvino_from_threads_and_in_a_stream(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    frames = [noise(seed, *SIZE, 3) for seed in range(24)]
    with Engine(folder, backend=NAME, threads=1) as engine:
        alone = [engine(frame).score for frame in frames]
        assert [result.score for result in engine.stream(frames)] == alone
        with ThreadPoolExecutor(6) as workers:
            assert [result.score for result in workers.map(engine, frames)] == alone


def test_openvino_computes_the_fp16_graph_in_f32(folder: Path) -> None:
    frame = noise(5, *SIZE, 3)
    with Engine(folder, backend=NAME, precision="fp16") as engine:
        assert "calibrated" not in engine.explain().splitlines()[0]
        np.testing.assert_allclose(engine(frame).anomaly_map, expected_map(frame), rtol=2e-2, atol=0.5)


def test_what_auto_computes_is_what_was_calibrated(tmp_path: Path) -> None:
    """A network of the real shape, whose maps bf16 moves by several times this bound."""
    need_openvino()
    need("torch")
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    size = (80, 96)
    graph = FusedGraph(tiny_detector(components=48, smoothing=0.5), size)
    model = export_onnx(graph, tmp_path / "model.onnx", 1.0).read_bytes()
    folder = write_bundle(tmp_path / "bundle", tiny_manifest(size), {"model.onnx": model}).path
    with (
        Engine(folder, backend="onnxruntime", threads=1) as engine,
        Engine(folder, backend="onnxruntime:cpu", precision="fp32", threads=1) as reference,
    ):
        if engine.backend.name != NAME:
            pytest.skip(f"auto takes {engine.backend.name} here")
        assert "calibrated" not in engine.backend.description
        for seed in range(3):
            frame = noise(seed, *size, 3)
            found, expected = engine(frame), reference(frame)
            assert np.ptp(expected.anomaly_map) > 0
            largest = float(expected.anomaly_map.max())
            assert np.abs(found.anomaly_map - expected.anomaly_map).max() <= 1e-3 * largest
            assert found.score == pytest.approx(expected.score, rel=1e-3)


def test_openvino_keeps_its_compiled_form_where_told(folder: Path, tmp_path: Path) -> None:
    frame = noise(6, *SIZE, 3)
    scores = []
    for _ in range(2):
        with Engine(folder, backend=NAME, cache=tmp_path) as engine:
            scores.append(engine(frame).score)
    assert scores[0] == scores[1]
    assert list(tmp_path.rglob("*.blob"))
    assert not list(folder.rglob("*.blob"))


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_openvino()
    folder = tmp_path_factory.mktemp("bf16") / "tiny"
    manifest = tiny_manifest(SIZE, precisions=("fp32", "bf16"))
    low = ThresholdTable(fpr=(0.0, 1.0), threshold=(7.0, 0.0), default_fpr=0.0, count=1000)
    manifest = dataclasses.replace(manifest, thresholds={**manifest.thresholds, "bf16": Thresholds(low, low)})
    write_bundle(folder, manifest, {"model.onnx": tiny_graph(SIZE)})
    return folder


@pytest.mark.parametrize("there", [True, False])
def test_bf16_is_taken_where_the_processor_has_it(
    bf16_folder: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """With thresholds of its own; a processor without it runs the same file in f32 at the FP32 thresholds."""
    import onnxruntime

    if there and not ort_openvino.has_bf16(onnxruntime):
        pytest.skip("OpenVINO reports no bf16 for this processor")
    monkeypatch.setattr(ort_openvino, "has_bf16", lambda ort, device=None: there)
    with Engine(bf16_folder, backend=NAME) as engine:
        assert engine.backend.precision == ("bf16" if there else "fp32")
        assert engine.threshold == (7.0 if there else 40.0)
        assert f", {'bf16' if there else 'f32'}, " in engine.backend.description
        assert "calibrated" not in engine.backend.description
        assert ("no bf16" in engine.explain()) is not there
        frame = noise(1, *SIZE, 3)
        np.testing.assert_allclose(engine(frame).anomaly_map, expected_map(frame), rtol=2e-2, atol=0.5)


def test_bf16_asked_for_where_there_is_none(bf16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_openvino, "has_bf16", lambda ort, device=None: False)
    with pytest.raises(BackendUnavailableError, match="cannot be used here") as caught:
        Engine(bf16_folder, backend=NAME, precision="bf16")
    assert "a device that has bf16" in caught.value.why
    with pytest.raises(BackendUnavailableError, match="bf16"):
        Engine(bf16_folder, backend="onnxruntime:cpu", precision="bf16")
    with Engine(bf16_folder, backend="onnxruntime:cpu") as engine:
        assert engine.backend.precision == "fp32"


@pytest.mark.parametrize(
    ("arithmetic", "device", "order"),
    [
        ("f32", None, ["int8", "fp32", "fp16", "int8-bf16", "bf16"]),
        ("bf16", None, ["int8-bf16", "bf16", "int8", "fp32", "fp16"]),
        ("f16", "GPU", ["fp16", "int8", "fp32", "int8-bf16", "bf16"]),
    ],
)
def test_an_arithmetic_prefers_what_was_calibrated_in_it(arithmetic: str, device: str | None, order: list[str]) -> None:
    preference = ("int8-bf16", "bf16", "int8", "fp32", "fp16")
    assert list(ort_openvino.calibrated_first(preference, arithmetic, device)) == order


def test_f32_asked_for_takes_the_fp32_thresholds(bf16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_openvino, "has_bf16", lambda ort, device=None: True)
    with Engine(bf16_folder, backend=NAME, arithmetic="f32") as engine:
        assert (engine.backend.precision, engine.threshold) == ("fp32", 40.0)
        assert "calibrated" not in engine.backend.description
