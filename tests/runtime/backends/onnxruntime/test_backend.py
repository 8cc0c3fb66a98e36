"""The ONNX Runtime backend: bound buffers, graphs that are none of ours, and the CUDA provider where there is one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_bundle import expected_map, gray_frame, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine, open_bundle
from saae_runtime.backends import open_backend
from saae_runtime.backends.base import BackendOptions
from saae_runtime.backends.onnxruntime import backend as backend_module
from saae_runtime.backends.onnxruntime import gpu
from saae_runtime.backends.onnxruntime.backend import OrtBackend
from saae_runtime.backends.onnxruntime.binding import SHAPES_KEPT, BindingPool, plan
from saae_runtime.backends.onnxruntime.gpu import gpu_providers
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendError, BundleCorruptError, ConfigError, DeviceError

SIZE = (24, 40)
CPU = "onnxruntime:cpu"


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(tiny_graph(SIZE), options, providers=["CPUExecutionProvider"])


def test_plan_has_the_graphs_own_shapes_and_types() -> None:
    inputs, outputs = plan(5, SIZE)
    names = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
    graph = session()
    declared = {item.name: item for item in (*graph.get_inputs(), *graph.get_overridable_initializers())}
    declared.update({item.name: item for item in graph.get_outputs()})
    assert {tensor.name for tensor in (*inputs, *outputs)} == set(declared)
    for tensor in (*inputs, *outputs):
        item = declared[tensor.name]
        assert tensor.dtype is names[item.type]
        assert tensor.shape == tuple(5 if side == "batch" else side for side in item.shape)
    assert inputs[0].nbytes == 5 * 24 * 40 * 3
    assert outputs[0].nbytes == 5 * 24 * 40 * 4


def test_bound_buffers_give_what_plain_runs_give() -> None:
    # The same code as on CUDA, with buffers on the host.
    graph = session()
    pool = BindingPool(onnxruntime, graph, "cpu", 0, SIZE, sets=2)
    kept = []
    for step, batch in enumerate([1, 3, 1, 2, 5, 3, 4, 6, 1]):
        frames = noise(step, batch, *SIZE, 3)
        limit = np.array([40.0 + 5 * (step // 3)], np.float32)
        outputs = pool.run(frames, limit)
        plain = graph.run(["anomaly_map", "score", "mask"], {"frame": frames, "threshold": limit})
        for bound, expected in zip(outputs, plain, strict=True):
            np.testing.assert_array_equal(bound, expected)
            assert bound.dtype == expected.dtype
        kept.append((outputs, [array.copy() for array in outputs]))
    for outputs, copies in kept:  # later calls reuse the buffers, never what a caller holds
        for array, copy in zip(outputs, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_buffers_are_made_once_per_batch_size_and_kept_few() -> None:
    pool = BindingPool(onnxruntime, session(), "cpu", 0, SIZE, sets=1)
    made = []
    make = pool._make
    pool._make = lambda batch, graph: (made.append(batch), make(batch, graph))[1]
    limit = np.array([1.0], np.float32)
    for _ in range(10):
        for batch in (1, 4):
            pool.run(noise(0, batch, *SIZE, 3), limit)
    assert made == [1, 4]
    for batch in range(1, SHAPES_KEPT + 3):
        pool.run(noise(0, batch, *SIZE, 3), limit)
    assert len(pool._free.get()) == SHAPES_KEPT


def run_in_threads(pool: BindingPool) -> None:
    """Six threads with batches of one to three, each answer checked."""

    def work(seed: int) -> None:
        frames = noise(seed, 1 + seed % 3, *SIZE, 3)
        for step in range(30):
            limit = np.array([float(seed + step)], np.float32)
            anomaly_map, _, mask = pool.run(frames, limit)
            np.testing.assert_allclose(anomaly_map[0], expected_map(frames[0]), rtol=1e-5, atol=1e-3)
            np.testing.assert_array_equal(mask, anomaly_map > limit[0])

    with ThreadPoolExecutor(6) as workers:
        for job in [workers.submit(work, seed) for seed in range(6)]:
            job.result(60)


def test_threads_share_the_sets() -> None:
    graph = session()
    pool = BindingPool(onnxruntime, graph, "cpu", 0, SIZE, sets=2)

    run_in_threads(pool)


class Watched:
    """A session that notes the number of each run's graph, and whether runs overlap."""

    def __init__(self) -> None:
        self.session, self.numbers, self.overlaps = session(), [], 0
        self._running = threading.Lock()

    def io_binding(self) -> object:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: object, options: onnxruntime.RunOptions) -> None:
        free = self._running.acquire(blocking=False)
        self.overlaps += not free
        self.numbers.append(int(options.get_run_config_entry("gpu_graph_id")))
        self.session.run_with_iobinding(binding, options)
        if free:
            self._running.release()


def test_each_set_and_batch_size_has_a_recorded_graph_of_its_own() -> None:
    watched = Watched()
    pool = BindingPool(onnxruntime, watched, "cpu", 0, SIZE, sets=2, graphs=True)
    limit = np.array([1.0], np.float32)
    pool.run(noise(0, 1, *SIZE, 3), limit)
    assert watched.numbers[:2] == [1, 2], "recorded in both sets, before the frame"
    assert watched.numbers[2] in (1, 2)
    for batch in range(2, SHAPES_KEPT + 3):
        watched.numbers.clear()
        pool.run(noise(0, batch, *SIZE, 3), limit)
        if batch <= SHAPES_KEPT:
            assert watched.numbers[:2] == [2 * batch - 1, 2 * batch]
        else:
            assert watched.numbers == [-1], "graphs stay with the session, so there are only a few"
    for batch in range(SHAPES_KEPT + 3, 2 * SHAPES_KEPT + 4):
        pool.run(noise(0, batch, *SIZE, 3), limit)
    watched.numbers.clear()
    pool.run(noise(0, 1, *SIZE, 3), limit)
    assert watched.numbers[0] in (1, 2), "further sizes took the buffers of a recorded one"
    assert len(pool._free.get()) == SHAPES_KEPT + 1, "buffers of further sizes pile up"


def test_a_session_with_graphs_computes_one_call_at_a_time() -> None:
    watched = Watched()
    pool = BindingPool(onnxruntime, watched, "cpu", 0, SIZE, sets=3, graphs=True)

    run_in_threads(pool)
    assert watched.overlaps == 0
    assert pool._free.qsize() == 3


def test_a_set_comes_back_after_a_failure() -> None:
    pool = BindingPool(onnxruntime, session(), "cpu", 0, SIZE, sets=1)
    limit = np.array([1.0], np.float32)
    with pytest.raises(Exception, match=r"(?i)shape|size|dimension|exceed|buffer"):
        pool.run(noise(0, 1, 99, 99, 3), limit)
    pool.run(noise(0, 1, *SIZE, 3), limit)  # would wait for ever without it


def written(tmp_path: Path, model: bytes) -> Path:
    return write_bundle(tmp_path / "b", tiny_manifest(SIZE), {"model.onnx": model}).path


def test_a_graph_that_is_none_of_ours(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_graph(SIZE))
    model.graph.output.pop()
    with pytest.raises(BundleCorruptError, match="not a graph of saae"):
        Engine(written(tmp_path, model.SerializeToString()), backend=CPU)


def test_a_graph_of_another_frame_size(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match="N x 24 x 40 x 3"):
        Engine(written(tmp_path, tiny_graph((24, 48))), backend=CPU)


@pytest.mark.parametrize("model", [b"", b"not a model", tiny_graph(SIZE)[:-100]])
def test_bytes_that_are_no_model(tmp_path: Path, model: bytes) -> None:
    with pytest.raises(BackendError, match="cannot load") as caught:
        Engine(written(tmp_path, model), backend=CPU)
    assert caught.value.why


NAMES = ("frame", "threshold", "anomaly_map", "score", "mask", "batch", "smooth", "gray", "Conv", "pads", "tiny")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["everywhere", "once"])
def test_names_that_are_no_utf8(tmp_path: Path, name: str, where: str) -> None:
    """ONNX Runtime takes some and fails at others in the middle of a sentence: never with an error of its own."""
    old, new = name.encode(), name[:-1].encode() + b"\xff"
    folder = written(tmp_path, tiny_graph(SIZE).replace(old, new, -1 if where == "everywhere" else 1))
    try:
        with Engine(folder, backend=CPU) as engine:
            found = f"score {engine(gray_frame(SIZE)).score}"
    except (BackendError, BundleCorruptError) as error:
        found = str(error)
    found.encode("utf-8")
    inner = name == "tiny" or (where == "everywhere" and name in ("smooth", "gray"))  # the graph's own affair
    assert found == "score 0.0" if inner else str(folder) in found


def test_a_batch_that_is_not_dynamic(tmp_path: Path) -> None:
    def fixed(batch: int) -> bytes:
        model = onnx.load_from_string(tiny_graph(SIZE))
        for value in (model.graph.input[0], *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        return model.SerializeToString()

    with Engine(written(tmp_path, fixed(1)), backend=CPU) as engine:
        assert engine.backend.max_batch == 1
        assert len(engine(noise(0, 3, *SIZE, 3))) == 3  # one at a time
    with pytest.raises(ConfigError, match="exactly 4"):
        Engine(written(tmp_path, fixed(4)), backend=CPU)


def test_a_failing_run_is_a_device_error_and_the_backend_lives_on(tmp_path: Path) -> None:
    backend = open_backend(open_bundle(make_tiny_bundle(tmp_path / "b", SIZE)), CPU)
    with pytest.raises(DeviceError, match="inference of 1 frames failed"):
        backend.infer(noise(0, 1, 5, 5, 3), 1.0)
    assert backend.infer(noise(0, 1, *SIZE, 3), 1.0).score.shape == (1,)
    backend.close()
    backend.close()


def test_outputs_have_the_protocols_types(tmp_path: Path) -> None:
    backend = open_backend(open_bundle(make_tiny_bundle(tmp_path / "b", SIZE)), CPU, threads=1)
    frames = noise(0, 2, *SIZE, 3)
    outputs = backend.collect(backend.submit(frames, 50.0))
    assert outputs.anomaly_map.dtype == np.float32
    assert outputs.anomaly_map.shape == (2, *SIZE)
    assert outputs.score.dtype == np.float32
    assert outputs.score.shape == (2,)
    assert outputs.mask.dtype == np.bool_
    np.testing.assert_array_equal(outputs.mask, outputs.anomaly_map > 50.0)
    assert "1 threads" in backend.description


class OnCpu(OrtBackend):
    """The CUDA backend with sessions and buffers on the CPU, to see how it opens."""

    refuses = ""

    def _session_of(self, settings: object, model: object, label: str, providers: list | None = None) -> object:
        graphs = "enable_cuda_graph" in providers[0][1]
        self.opened = [*getattr(self, "opened", []), graphs]
        if graphs and self.refuses:
            raise BackendError("cannot load", self.refuses, "")
        return onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str, cuda_graph: bool = True) -> OnCpu:
    bundle = open_bundle(make_tiny_bundle(tmp_path / "b", SIZE))
    monkeypatch.setattr(OnCpu, "refuses", refuses)
    monkeypatch.setattr(backend_module, "BindingPool", _pool_on_cpu)
    options = BackendOptions(cuda_graph=cuda_graph)
    return OnCpu(bundle, "onnxruntime:cuda", bundle.manifest.artefacts[0], 0, options)


def _pool_on_cpu(ort: object, graph: object, kind: str, *rest: object) -> BindingPool:
    return BindingPool(ort, graph, "cpu", *rest)


def test_cuda_records_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = on_cpu(tmp_path, monkeypatch, "")
    assert backend.opened == [True]
    assert "CUDA graph" in backend.description
    assert backend.infer(noise(0, 1, *SIZE, 3), 1.0).score.shape == (1,)


def test_cuda_runs_without_a_graph_that_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: recording was refused \\(a node for the CPU"):
        backend = on_cpu(tmp_path, monkeypatch, "a node for the CPU")
    assert backend.opened == [True, False]
    assert "CUDA graph" not in backend.description
    assert backend.infer(noise(0, 1, *SIZE, 3), 1.0).score.shape == (1,)


def test_cuda_graphs_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cpu(tmp_path, monkeypatch, "", cuda_graph=False).opened == [False]


@pytest.mark.gpu
def test_cuda_graphs_change_no_answer(tmp_path: Path) -> None:
    bundle = open_bundle(make_tiny_bundle(tmp_path / "b", SIZE, precisions=("fp32", "fp16")))
    try:
        on = open_backend(bundle, "onnxruntime:cuda", cuda_graph=True)
    except BackendError as error:
        pytest.skip(f"ONNX Runtime's CUDA provider cannot be used here: {error.why}")
    off = open_backend(bundle, "onnxruntime:cuda", cuda_graph=False)
    assert "CUDA graph" in on.description, "recording was refused"
    assert "CUDA graph" not in off.description
    for step, batch in enumerate([1, 3, 1, 8, 3, 5, 6, 7, 1, 3]):
        frames = noise(step, batch, *SIZE, 3)
        a, b = on.infer(frames, 30.0 + step), off.infer(frames, 30.0 + step)
        np.testing.assert_array_equal(a.anomaly_map, b.anomaly_map)
        np.testing.assert_array_equal(a.score, b.score)
        np.testing.assert_array_equal(a.mask, b.mask)
    with ThreadPoolExecutor(4) as workers:
        frames = [noise(seed, 1 + seed % 9, *SIZE, 3) for seed in range(40)]
        for found, given in zip(workers.map(lambda given: on.infer(given, 40.0), frames), frames, strict=True):
            np.testing.assert_array_equal(found.anomaly_map, off.infer(given, 40.0).anomaly_map)
    on.close()
    off.close()


@pytest.mark.gpu
def test_cuda_provider(tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "b", SIZE, precisions=("fp32", "fp16"))
    try:
        engine = Engine(folder, backend="onnxruntime:cuda")
    except BackendError as error:
        pytest.skip(f"ONNX Runtime's CUDA provider cannot be used here: {error.why}")
    with engine, Engine(folder, backend=CPU) as reference:
        assert engine.backend.precision == "fp16"
        for batch in (1, 3, 32, 5):
            frames = noise(batch, batch, *SIZE, 3)
            for result, expected in zip(engine(frames), reference(frames), strict=True):
                np.testing.assert_allclose(result.anomaly_map, expected.anomaly_map, rtol=5e-3, atol=0.1)
        frames = [noise(seed, *SIZE, 3) for seed in range(16)]
        alone = [engine(frame).score for frame in frames]
        assert [result.score for result in engine.stream(frames)] == alone
        with ThreadPoolExecutor(4) as workers:
            assert [result.score for result in workers.map(engine, frames)] == alone
    with Engine(folder, backend="onnxruntime:cuda", precision="fp32") as engine:
        frame = noise(99, *SIZE, 3)
        np.testing.assert_allclose(engine(frame).anomaly_map, expected_map(frame), rtol=1e-4, atol=1e-2)


def test_two_engines_in_one_process(tmp_path: Path) -> None:
    small = make_tiny_bundle(tmp_path / "small", SIZE)
    large = make_tiny_bundle(tmp_path / "large", (48, 80), threshold=10.0)
    with Engine(small, backend=CPU) as a, Engine(large, backend=CPU) as b:
        frame = gray_frame((48, 80), spot=(10, 10, 10, 10))
        assert a(frame).threshold == 40.0
        assert b(frame).threshold == 10.0


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_several_batches_in_flight(tmp_path: Path, slots: int) -> None:
    frames = [noise(seed, *SIZE, 3) for seed in range(20)]
    with Engine(make_tiny_bundle(tmp_path / "b", SIZE), backend=CPU, slots=slots, threads=1) as engine:
        assert engine.backend.slots == slots
        alone = [engine(frame).score for frame in frames]
        assert [result.score for result in engine.stream(frames)] == alone
        assert [result.score for result in engine.stream(frames, batch_size=3)] == pytest.approx(alone, rel=1e-6)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saae-")]


def test_a_failure_in_flight_is_raised_at_collect(tmp_path: Path) -> None:
    backend = open_backend(open_bundle(make_tiny_bundle(tmp_path / "b", SIZE)), CPU, slots=2)
    bad, good = backend.submit(noise(0, 1, 5, 5, 3), 1.0), backend.submit(noise(0, 1, *SIZE, 3), 1.0)
    with pytest.raises(DeviceError):
        backend.collect(bad)
    assert backend.collect(good).score.shape == (1,)
    backend.close()


def provider(folder: Path, text: bytes) -> Path:
    """ONNX Runtime's folder with a TensorRT provider of this text."""
    (folder / "capi").mkdir(parents=True)
    (folder / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(text)
    return folder


def test_tensorrt_is_looked_for_by_the_name_that_the_provider_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    there: set[str] = set()

    def load(name: str, mode: int = 0) -> None:
        asked.append(name)
        if name not in there:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", load)
    folder = provider(tmp_path / "ort", b"\x00libcudart.so.13\x00libnvinfer.so.10\x00libnvinfer_plugin.so.10\x00")
    assert gpu.load_tensorrt.__wrapped__(folder) == "TensorRT (libnvinfer.so.10) is not installed"
    assert asked == ["libnvinfer.so.10"]
    libraries = tmp_path / "site" / "tensorrt_libs"
    libraries.mkdir(parents=True)
    (libraries / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(libraries.parent))
    there.add(str(libraries / "libnvinfer.so.10"))
    assert gpu.load_tensorrt.__wrapped__(folder) == ""
    there = {"libnvinfer.so.10"}
    assert gpu.load_tensorrt.__wrapped__(folder) == ""
    assert gpu.load_tensorrt.__wrapped__(provider(tmp_path / "other", b"nothing")) == ""
    assert "cannot be read" in gpu.load_tensorrt.__wrapped__(tmp_path / "none")


def test_options_of_the_gpu_providers(tmp_path: Path) -> None:
    ((name, cuda),) = gpu_providers(False, 1, SIZE, 32, None)
    assert name == "CUDAExecutionProvider"
    assert cuda["device_id"] == "1"
    assert cuda["use_tf32"] == "0"
    ((_, first),) = gpu_providers(False, 0, SIZE, 32, None)
    assert "device_id" not in first  # the default, and ONNX Runtime warns where it is named
    (name, engine), (fallback, _) = gpu_providers(True, 0, SIZE, 16, tmp_path)
    assert (name, fallback) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert engine["trt_profile_max_shapes"] == "frame:16x24x40x3"
    assert engine["trt_engine_cache_path"] == str(tmp_path)
    assert not [key for key in engine if "fp16" in key or "int8" in key]  # the graph's own types are obeyed
    (_, engine), _ = gpu_providers(True, 0, SIZE, 16, None)
    assert not [key for key in engine if "cache" in key]
