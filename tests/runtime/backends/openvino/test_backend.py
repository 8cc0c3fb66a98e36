"""OpenVINO: run for real where the package is installed, its settings checked everywhere."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from needs import need
from tiny_bundle import expected_map, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine, open_bundle
from saae_runtime.backends import BackendOptions
from saae_runtime.backends.openvino import backend, bf16_missing, choose, library
from saae_runtime.backends.openvino.arithmetic import arithmetic_of, calibrated_first
from saae_runtime.backends.openvino.backend import OpenVinoBackend, properties
from saae_runtime.backends.openvino.library import Device, Library, device_missing
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendError, BackendUnavailableError, BundleCorruptError, ConfigError, DeviceError
from saae_runtime.manifest import Thresholds
from saae_runtime.thresholds import ThresholdTable

SIZE = (32, 48)
NAME = "openvino"


class FakeCore:
    """OpenVINO's core with the devices that a test names: kind -> capabilities."""

    def __init__(self, devices: dict[str, str]) -> None:
        self.devices = devices

    @property
    def available_devices(self) -> list[str]:
        return list(self.devices)

    def get_property(self, kind: str, name: str) -> object:
        if kind not in self.devices:
            raise RuntimeError(f"Device with {kind!r} name is not registered in the OpenVINO Runtime")
        return {"FULL_DEVICE_NAME": f"some {kind} ", "OPTIMIZATION_CAPABILITIES": self.devices[kind].split()}[name]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The process as if nobody had asked for OpenVINO yet."""
    outcome: list = []
    monkeypatch.setattr(library, "_outcome", outcome)
    return outcome


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with instructions for bf16, whatever the one is that tests run on."""
    monkeypatch.setattr(library, "processor_flags", lambda: frozenset({"avx2", "avx512f", "avx512_bf16"}))


def fake_library(devices: dict[str, str]) -> Library:
    return Library(SimpleNamespace(__version__="2026.1.0-123-releases/2026/1"), FakeCore(devices))


@pytest.mark.parametrize(
    ("kind", "able", "precision", "asked", "expected"),
    [
        ("CPU", "FP32 FP16 INT8 BF16", "fp32", None, "f32"),
        ("CPU", "FP32 FP16 INT8 BF16", "fp16", None, "f32"),
        ("CPU", "FP32 FP16 INT8 BF16", "bf16", None, "bf16"),
        ("CPU", "FP32 FP16 INT8 BF16", "int8", None, "f32"),
        ("CPU", "FP32 FP16 INT8 BF16", "int8-bf16", None, "bf16"),
        ("CPU", "FP32 INT8", "fp32", None, "f32"),
        ("CPU", "", "fp32", None, "f32"),
        ("GPU", "FP32 FP16 INT8", "fp32", None, "f32"),
        ("GPU", "FP32 FP16 INT8", "fp16", None, "f16"),
        ("NPU", "FP16 INT8", "fp16", None, "f16"),
        ("CPU", "FP32 FP16 INT8 BF16", "fp32", "bf16", "bf16"),
        ("CPU", "FP32 INT8", "fp32", "f32", "f32"),
    ],
)
@pytest.mark.usefixtures("with_bf16")
def test_arithmetic_is_the_calibrated_one_unless_asked(
    kind: str, able: str, precision: str, asked: str | None, expected: str
) -> None:
    device = fake_library({kind: able}).device(kind)
    assert device == Device(kind, f"some {kind}", tuple(able.split()))
    assert arithmetic_of(device, precision, asked) == expected


def test_arithmetic_that_the_device_has_not() -> None:
    with pytest.raises(BackendUnavailableError, match="does not compute in bf16") as caught:
        arithmetic_of(Device("CPU", "old one", ("FP32", "INT8")), "fp32", "bf16")
    assert "f32" in caught.value.cure


def test_no_other_arithmetic_behind_your_back() -> None:
    with pytest.raises(BackendUnavailableError, match="does not compute in f32") as caught:
        arithmetic_of(Device("NPU", "some NPU", ("FP16", "INT8")), "fp32", None)
    assert "calibrated in f32" in caught.value.why
    assert "arithmetic='f16'" in caught.value.cure


@pytest.mark.parametrize(
    ("arithmetic", "kind", "order"),
    [
        ("f32", "CPU", ["int8", "fp32", "fp16", "int8-bf16", "bf16"]),
        ("bf16", "CPU", ["int8-bf16", "bf16", "int8", "fp32", "fp16"]),
        ("f16", "GPU", ["fp16", "int8", "fp32", "int8-bf16", "bf16"]),
    ],
)
def test_an_arithmetic_prefers_what_was_calibrated_in_it(arithmetic: str, kind: str, order: list[str]) -> None:
    preference = ("int8-bf16", "bf16", "int8", "fp32", "fp16")
    assert list(calibrated_first(preference, arithmetic, kind)) == order


@pytest.mark.parametrize(("precision", "kept"), [("fp32", 0), ("bf16", 2)])
def test_a_model_in_bf16_keeps_its_score_precise_alone_and_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kept: int
) -> None:
    if why := device_missing("CPU")[0] or (precision == "bf16" and bf16_missing()):
        pytest.skip(why)
    models = []
    monkeypatch.setattr(backend, "keep_precise", models.append)
    bundle = make_tiny_bundle(tmp_path / "b", SIZE, precisions=("fp32", "bf16"))
    with Engine(bundle, backend=NAME, precision=precision, threads=1) as engine:
        engine(np.zeros((3, *SIZE, 3), np.uint8))
    assert len(models) == kept


def test_properties_are_explicit() -> None:
    """Without a hint for the arithmetic OpenVINO would take bf16 where it is fast."""
    options = BackendOptions(hint="throughput", threads=2)
    assert properties("CPU", "f32", options, Path("/c")) == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": 2,
        "CACHE_DIR": "/c",
    }
    assert properties("GPU", "f16", options, None) == {
        "INFERENCE_PRECISION_HINT": "f16",
        "PERFORMANCE_HINT": "THROUGHPUT",
    }


@pytest.mark.parametrize(
    ("devices", "kind", "why", "cure"),
    [
        ({"CPU": "FP32"}, "NPU", "OpenVINO 2026.1.0 offers CPU on this machine", "leave device_type out"),
        ({}, "CPU", "offers no device on this machine", "onnxruntime:cpu"),
    ],
)
def test_a_device_that_is_not_there(fresh: list, devices: dict[str, str], kind: str, why: str, cure: str) -> None:
    fresh.append(fake_library(devices))
    with pytest.raises(BackendUnavailableError, match=f"no {kind} device here"):
        library.load_library().device(kind)
    found = device_missing(kind)
    assert why in found[0]
    assert cure in found[1]


def test_not_installed(fresh: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    bundle = tmp_path / "tiny"
    write_bundle(bundle, tiny_manifest(SIZE), {"model.onnx": b"not read"})
    (candidate,) = choose.candidates(open_bundle(bundle))
    assert candidate.why_not == "the package openvino is not installed"
    assert candidate.cure == "pip install 'saae[openvino]'"
    with pytest.raises(BackendUnavailableError, match="openvino cannot be used here") as caught:
        Engine(bundle, backend=NAME)
    assert (caught.value.why, caught.value.cure) == (candidate.why_not, candidate.cure)
    assert bf16_missing() == candidate.why_not
    assert fresh == []  # it may be installed while the program runs


def test_every_open_says_what_the_first_did(fresh: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An import that failed half-way fails otherwise the next time, with an error that is beside the point."""
    tries: list[str] = []

    def broken(name: str) -> None:
        tries.append(name)
        raise ImportError(
            "libtbb.so.12: cannot open shared object file" if len(tries) == 1 else "partially initialised"
        )

    monkeypatch.setattr(library, "find_spec", lambda _: object())
    monkeypatch.setattr(library.importlib, "import_module", broken)
    bundle = open_bundle(write_bundle(tmp_path / "tiny", tiny_manifest(SIZE), {"model.onnx": b"not read"}).path)
    said = []
    for _ in range(2):
        with pytest.raises(BackendUnavailableError) as caught:
            choose.open_backend(bundle, NAME, 0, None, BackendOptions())
        said.append(str(caught.value))
        (candidate,) = choose.candidates(bundle)
        assert candidate.why_not == caught.value.why
        assert "libtbb.so.12" in bf16_missing()
    assert said[0] == said[1]
    assert tries == ["openvino"]


@pytest.mark.usefixtures("with_bf16")
def test_bf16_that_the_processor_has_not(fresh: list) -> None:
    fresh.append(fake_library({"CPU": "FP32 INT8"}))
    assert bf16_missing() == "this processor has no bf16 instructions (some CPU)"
    fresh[0] = fake_library({"CPU": "FP32 INT8 BF16"})
    assert bf16_missing() == ""


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("avx2 avx512f avx512_bf16", True),
        ("avx2 avx512f amx_bf16", True),
        ("avx2 avx_vnni avx_ne_convert", True),
        ("avx2 avx512f avx512_vnni", False),
        ("", True),
    ],
)
def test_bf16_that_would_be_emulated_is_none(
    fresh: list, monkeypatch: pytest.MonkeyPatch, flags: str, there: bool
) -> None:
    """OpenVINO reports BF16 on every processor with AVX-512; where the system says nothing it is believed."""
    fresh.append(fake_library({"CPU": "FP32 INT8 BF16", "GPU": "FP32 BF16"}))
    monkeypatch.setattr(library, "processor_flags", lambda: frozenset(flags.split()))
    assert (bf16_missing() == "") is there
    assert ("BF16" in library.load_library().device("CPU").capabilities) is there
    assert "BF16" in library.load_library().device("GPU").capabilities


def need_openvino() -> None:
    """Skips where OpenVINO has no CPU device, and says why: asked of the library, not of what is installed."""
    why, _ = device_missing("CPU")
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_openvino()
    return make_tiny_bundle(tmp_path_factory.mktemp("openvino") / "tiny", SIZE, precisions=("fp32", "fp16"))


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_auto_takes_openvino_where_it_is(folder: Path) -> None:
    with Engine(folder) as engine:
        if engine.backend.name == "onnxruntime:cuda":
            pytest.skip("this machine has CUDA, which auto rightly takes")
        assert engine.backend.name == NAME
        assert "* openvino: in use" in engine.explain()


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_openvino_equals_numpy(folder: Path, hint: str) -> None:
    with Engine(folder, backend=NAME, precision="fp32", hint=hint, threads=1) as engine:
        assert "f32" in engine.backend.description
        for batch in (1, 3, 11):
            frames = noise(batch, batch, *SIZE, 3)
            for frame, result in zip(frames, engine(frames), strict=True):
                np.testing.assert_allclose(result.anomaly_map, expected_map(frame), rtol=1e-5, atol=1e-3)
            outputs = engine.backend.infer(frames[:8], 62.0)
            assert 0 < outputs.mask.mean() < 1
            np.testing.assert_array_equal(outputs.mask, outputs.anomaly_map > 62.0)
            np.testing.assert_array_equal(outputs.score, outputs.anomaly_map.max(axis=(1, 2)))


def test_single_frames_have_a_model_of_fixed_shape_and_batches_one_of_their_own(folder: Path) -> None:
    frames = noise(3, 5, *SIZE, 3)
    with Engine(folder, backend=NAME, precision="fp32", threads=1) as engine:
        backend = engine.backend
        assert isinstance(backend, OpenVinoBackend)
        assert list(backend._one.get().input("frame").shape) == [1, *SIZE, 3]
        assert backend._many is not None
        alone = [engine(frame).score for frame in frames]
        assert not backend._many.is_ready  # no memory for what nobody uses
        assert [result.score for result in engine(frames)] == pytest.approx(alone, rel=1e-6)
        assert backend._many.is_ready
    with Engine(folder, backend=NAME, precision="fp32", threads=1, max_batch=3) as engine:
        assert isinstance(engine.backend, OpenVinoBackend)
        assert engine.backend._many is not None
        assert engine.backend._many.is_ready  # batches were announced: nobody waits for it later
    with Engine(folder, backend=NAME, precision="fp32", threads=1, max_batch=1) as engine:
        assert [result.score for result in engine(frames)] == alone


def test_a_graph_whose_batch_is_fixed(tmp_path: Path) -> None:
    need_openvino()
    onnx = need("onnx")
    for batch in (1, 4):
        model = onnx.load_from_string(tiny_graph(SIZE))
        for value in (model.graph.input[0], *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        folder = write_bundle(
            tmp_path / str(batch), tiny_manifest(SIZE), {"model.onnx": model.SerializeToString()}
        ).path
        if batch == 1:
            with Engine(folder, backend=NAME) as engine:
                assert engine.backend.max_batch == 1
                frames = noise(1, 2, *SIZE, 3)
                np.testing.assert_allclose(engine(frames)[1].anomaly_map, expected_map(frames[1]), rtol=1e-5, atol=1e-3)
        with pytest.raises(ConfigError, match=f"batches of exactly {batch}"):
            Engine(folder, backend=NAME, max_batch=2)


@pytest.mark.parametrize("kind", ["cut", "other size", "other names", "unknown operator"])
def test_a_file_that_is_no_graph_of_ours(tmp_path: Path, kind: str) -> None:
    need_openvino()
    onnx = need("onnx")
    model = onnx.load_from_string(tiny_graph((16, 16) if kind == "other size" else SIZE))
    if kind == "other names":
        model.graph.output[2].name = "veil"
        model.graph.node[-1].output[0] = "veil"
    if kind == "unknown operator":
        model.graph.node[2].op_type = "Whirl"
    data = model.SerializeToString()[: 300 if kind == "cut" else None]
    folder = write_bundle(tmp_path / "b", tiny_manifest(SIZE), {"model.onnx": data}).path
    expected = BackendError if kind == "unknown operator" else BundleCorruptError
    with pytest.raises(expected, match=r"model\.onnx") as caught:
        Engine(folder, backend=NAME)
    assert caught.value.cure


def test_an_inference_that_fails_says_so_and_the_next_one_works(folder: Path) -> None:
    with Engine(folder, backend=NAME, precision="fp32", max_batch=1) as engine:
        frame = noise(1, *SIZE, 3)
        score = engine(frame).score
        with pytest.raises(DeviceError, match="the inference of 2 frames failed") as caught:
            engine.backend.infer(noise(1, 2, *SIZE, 3), 1.0)
        assert caught.value.why
        assert engine(frame).score == score


def test_frames_that_may_not_be_written_to(folder: Path) -> None:
    frame = noise(9, *SIZE, 3)
    frame.setflags(write=False)
    with Engine(folder, backend=NAME, precision="fp32") as engine:
        first = engine(frame).anomaly_map
        kept = first.copy()
        engine(noise(10, *SIZE, 3))
        np.testing.assert_array_equal(first, kept)  # results are the caller's, not OpenVINO's memory


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


@pytest.mark.usefixtures("exported_once")
def test_what_it_computes_is_what_was_calibrated(tmp_path: Path) -> None:
    """A network of the real shape, whose maps bf16 moves by several times this bound."""
    need_openvino()
    need("torch")
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    size = (80, 100)
    graph = FusedGraph(tiny_detector(components=48, smoothing=0.5, score="cosine"), size)
    model = export_onnx(graph, tmp_path / "model.onnx", 1.0).read_bytes()
    folder = write_bundle(tmp_path / "bundle", tiny_manifest(size), {"model.onnx": model}).path
    with (
        Engine(folder, backend=NAME, threads=1) as engine,
        Engine(folder, backend="onnxruntime:cpu", precision="fp32", threads=1) as reference,
    ):
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
    for number in range(3):
        with Engine(folder, backend=NAME, cache=tmp_path) as engine:
            scores.append(engine(frame).score)
        blobs = list(tmp_path.rglob("*.blob"))
        assert blobs
        if number == 1:  # a disk that was full, a file that was cut: it is compiled again
            for blob in blobs:
                blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    assert len(set(scores)) == 1
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
    if there and (why := bf16_missing()):
        pytest.skip(why)
    monkeypatch.setattr(choose, "has_bf16", lambda device: there)
    with Engine(bf16_folder, backend=NAME) as engine:
        assert engine.backend.precision == ("bf16" if there else "fp32")
        assert engine.threshold == (7.0 if there else 40.0)
        assert f", {'bf16' if there else 'f32'}, " in engine.backend.description
        assert "calibrated" not in engine.backend.description
        assert ("no bf16" in engine.explain()) is not there
        frame = noise(1, *SIZE, 3)
        np.testing.assert_allclose(engine(frame).anomaly_map, expected_map(frame), rtol=2e-2, atol=0.5)


def test_bf16_asked_for_where_there_is_none(bf16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_bf16", lambda device: False)
    with pytest.raises(BackendUnavailableError, match="cannot be used here") as caught:
        Engine(bf16_folder, backend=NAME, precision="bf16")
    assert "a device that has bf16" in caught.value.why
    with pytest.raises(BackendUnavailableError, match="bf16"):
        Engine(bf16_folder, backend="onnxruntime:cpu", precision="bf16")
    with Engine(bf16_folder, backend="onnxruntime:cpu") as engine:
        assert engine.backend.precision == "fp32"


def test_f32_asked_for_takes_the_fp32_thresholds(bf16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_bf16", lambda device: True)
    with Engine(bf16_folder, backend=NAME, arithmetic="f32") as engine:
        assert (engine.backend.precision, engine.threshold) == ("fp32", 40.0)
        assert "calibrated" not in engine.backend.description


def test_importing_it_reports_to_nobody(repo_root: Path, tmp_path: Path) -> None:
    """The package's own import writes an identifier below the home folder and sends an event to a host."""
    need_openvino()
    folder = make_tiny_bundle(tmp_path / "b", (16, 24))
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys
from saae_runtime import Engine
Engine({str(folder)!r}, backend="openvino").close()
assert "openvino_telemetry" not in sys.modules
import openvino
assert openvino.convert_model  # what others in the process use is still there
"""
    environment = {"HOME": str(home), "PATH": "", "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(home.rglob("*")) == []
