"""The engine on ONNX Runtime's CPU provider: frames in, results out."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_bundle import expected_map, gray_frame, make_tiny_bundle, tiny_graph, tiny_manifest

from saae_runtime import Engine, Result, open_bundle
from saae_runtime import engine as engine_module
from saae_runtime.backends import RawOutputs
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendError, BundleNotFoundError, ConfigError, FrameError
from saae_runtime.geometry import resize_frames, upsample_map

SIZE = (64, 96)
CPU = "onnxruntime:cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("engine") / "tiny", SIZE, threshold=40.0)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, backend=CPU, threads=1) as engine:
        yield engine


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def exhaust(results: Iterable, into: list | None = None) -> None:
    for result in results:
        if into is not None:
            into.append(result)


def test_one_frame(engine: Engine) -> None:
    frame = noise(0, *SIZE, 3)
    result = engine(frame)
    np.testing.assert_allclose(result.anomaly_map, expected_map(frame), rtol=1e-5, atol=1e-3)
    assert result.anomaly_map.dtype == np.float32
    assert result.score == pytest.approx(float(expected_map(frame).max()), rel=1e-5)
    assert result.mask.dtype == np.bool_
    np.testing.assert_array_equal(result.mask, result.anomaly_map > 40.0)
    assert result.threshold == result.image_threshold == 40.0
    assert result.is_anomalous


def test_normal_and_defective(engine: Engine) -> None:
    assert not engine(gray_frame(SIZE)).is_anomalous
    result = engine(gray_frame(SIZE, spot=(10, 20, 8, 12)))
    assert result.is_anomalous
    (region,) = result.regions()
    left, top, right, bottom = region.bbox
    assert (left, top, right, bottom) == (19, 9, 33, 19)
    assert 20 <= region.peak[0] < 32
    assert 10 <= region.peak[1] < 18


def test_gray_equals_three_equal_channels(engine: Engine) -> None:
    gray = noise(1, *SIZE)
    rgb = engine(np.repeat(gray[:, :, None], 3, axis=2))
    for form in (gray, gray[:, :, None]):
        np.testing.assert_array_equal(engine(form).anomaly_map, rgb.anomaly_map)


@pytest.mark.parametrize("size", [(128, 192), (30, 40), (64, 97), (1, 1), (500, 20)])
def test_any_frame_size(engine: Engine, size: tuple[int, int]) -> None:
    frame = noise(2, *size, 3)
    result = engine(frame)
    assert result.size == size
    at_graph_size = engine(resize_frames(frame, SIZE))
    assert result.score == at_graph_size.score
    np.testing.assert_allclose(result.anomaly_map, upsample_map(at_graph_size.anomaly_map, size), rtol=1e-6)
    np.testing.assert_array_equal(result.mask, result.anomaly_map > np.float32(40.0))


def test_batch_list_and_single_agree(engine: Engine) -> None:
    frames = noise(3, 5, *SIZE, 3)
    batch = engine(frames)
    assert isinstance(batch, list)
    for frame, from_batch, from_list in zip(frames, batch, engine(list(frames)), strict=True):
        single = engine(frame)
        np.testing.assert_allclose(from_batch.anomaly_map, single.anomaly_map, rtol=1e-6)
        np.testing.assert_allclose(from_list.anomaly_map, single.anomaly_map, rtol=1e-6)
        assert from_batch.score == pytest.approx(single.score, rel=1e-6)


def test_list_of_mixed_sizes_and_none_at_all(engine: Engine) -> None:
    frames = [noise(4, 20, 30, 3), noise(5, *SIZE), noise(6, 100, 50, 1)]
    assert [result.size for result in engine(frames)] == [(20, 30), SIZE, (100, 50)]
    assert engine([]) == []
    assert engine(np.empty((0, *SIZE, 3), np.uint8)) == []


def test_batch_above_the_limit_is_split(folder: Path) -> None:
    with Engine(folder, backend=CPU, max_batch=3, threads=1) as engine:
        seen = []
        infer = engine.backend.infer
        engine.backend.infer = lambda frames, t: (seen.append(len(frames)), infer(frames, t))[1]  # type: ignore[method-assign]
        frames = noise(7, 8, *SIZE, 3)
        results = engine(frames)
        assert seen == [3, 3, 2]
        for frame, result in zip(frames, results, strict=True):
            np.testing.assert_allclose(result.anomaly_map, expected_map(frame), rtol=1e-5, atol=1e-3)


def test_not_contiguous(engine: Engine) -> None:
    big = noise(8, 2 * SIZE[0], 2 * SIZE[1], 3)
    view = big[::2, ::-2, ::-1]
    np.testing.assert_array_equal(engine(view).anomaly_map, engine(view.copy()).anomaly_map)


def test_thresholds_by_rate_and_by_value(folder: Path, engine: Engine) -> None:
    frame = noise(9, *SIZE, 3)
    table = engine.manifest.thresholds["fp32"].pixel
    assert engine(frame, fpr=0.0).threshold == 60.0
    assert engine(frame, fpr=0.01).threshold == 20.0
    assert engine(frame, fpr=0.005).threshold == pytest.approx(table.at(0.005))
    changed = engine(frame, threshold=70.0)
    assert changed.threshold == 70.0
    assert changed.image_threshold == 40.0
    # A frame called anomalous always shows why: above both thresholds the lower one outlines.
    np.testing.assert_array_equal(changed.mask, changed.anomaly_map > 40.0)
    clean = engine(frame, threshold=1.0, image_threshold=1e6)
    assert not clean.is_anomalous
    assert not clean.mask.any()
    assert changed.mask.sum() < engine(frame, threshold=20.0).mask.sum()
    assert engine(frame, image_threshold=1000.0).is_anomalous is False
    assert engine(frame, image_fpr=0.0).image_threshold == 60.0
    assert engine(frame).threshold == 40.0  # a call changes nothing for the next
    with Engine(folder, backend=CPU, fpr=0.0, image_threshold=5) as strict:
        assert (strict.threshold, strict.image_threshold) == (60.0, 5.0)
        assert strict(frame).threshold == 60.0
        assert strict(frame, threshold=1).threshold == 1.0
        assert strict(frame, fpr=0.01).threshold == 20.0


@pytest.mark.parametrize(
    "options",
    [
        {"fpr": 0.1, "threshold": 1.0},
        {"image_fpr": 0.1, "image_threshold": 1.0},
        {"fpr": -0.1},
        {"fpr": 1.1},
        {"fpr": math.nan},
        {"fpr": "0.1"},
        {"image_fpr": 2},
        {"threshold": math.nan},
        {"threshold": math.inf},
        {"threshold": "high"},
        {"image_threshold": math.nan},
        {"image_threshold": True},
        {"threshold": 10**400},
        pytest.param({"image_threshold": -(10**5000)}, id="long"),
        {"threshold": 1e39},
        {"threshold": 1j},
        {"threshold": np.complex64(1)},
        {"image_threshold": np.float32("nan")},
        {"fpr": 1j},
        {"fpr": np.complex128(0.1)},
        pytest.param({"image_fpr": 10**5000}, id="long rate"),
        {"fpr": np.float64("inf")},
    ],
)
def test_impossible_thresholds(folder: Path, engine: Engine, options: dict) -> None:
    with pytest.raises(ConfigError):
        engine(gray_frame(SIZE), **options)
    with pytest.raises(ConfigError):
        engine.stream([], **options)
    with pytest.raises(ConfigError):
        Engine(folder, backend=CPU, **options)


@pytest.mark.parametrize(
    "frame",
    [np.zeros(SIZE, np.float32), np.zeros(SIZE, np.uint16), np.zeros(SIZE, bool), np.zeros((*SIZE, 4), np.uint8)],
)
def test_wrong_frames(engine: Engine, frame: np.ndarray) -> None:
    with pytest.raises(FrameError) as caught:
        engine(frame)
    assert str(frame.shape) in str(caught.value)
    assert str(frame.dtype) in str(caught.value)
    assert not engine(gray_frame(SIZE)).is_anomalous  # still usable


@pytest.mark.parametrize("slots", [1, 3])
def test_want_of_memory_for_one_frame_is_that_frames_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if size == (70, 50):
            raise MemoryError("Unable to allocate 1. GiB")
        return upsample_map(maps, size)

    monkeypatch.setattr("saae_runtime.geometry.upsample_map", upsample)
    good, large = noise(33, 60, 50, 3), noise(34, 70, 50, 3)
    with Engine(folder, backend=CPU, threads=1, slots=slots) as engine:
        with pytest.raises(FrameError, match="70 x 50"):
            engine(large)
        seen: list[Result] = []
        with pytest.raises(FrameError, match="70 x 50"):
            exhaust(engine.stream([good, good, large, good], batch_size=2), seen)
        assert len(seen) == 2
        assert engine(good).size == (60, 50)


class _NoInterface:
    @property
    def __cuda_array_interface__(self) -> dict:
        raise RuntimeError("call detach first")


def test_an_object_that_fails_when_it_is_asked_is_a_frame_error(engine: Engine) -> None:
    with pytest.raises(FrameError, match="call detach first"):
        engine(_NoInterface())


def test_result_is_frozen_and_independent(engine: Engine) -> None:
    result = engine(gray_frame(SIZE, spot=(0, 0, 9, 9)))
    before = result.anomaly_map.copy()
    engine(noise(10, *SIZE, 3))
    np.testing.assert_array_equal(result.anomaly_map, before)
    with pytest.raises(ValueError, match="read-only"):
        result.anomaly_map[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        result.mask[0, 0] = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.score = 0.0  # type: ignore[misc]


def test_result_pictures_and_json(engine: Engine) -> None:
    frame = gray_frame((80, 100), spot=(20, 30, 20, 20))
    result = engine(frame)
    heat = result.heatmap()
    assert heat.shape == (80, 100, 3)
    assert heat.dtype == np.uint8
    assert result.overlay(frame).shape == frame.shape
    assert not np.array_equal(result.overlay(frame), frame)
    with pytest.raises(FrameError):
        result.overlay(gray_frame((10, 10)))
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["is_anomalous"] is True
    assert data["height"] == 80
    assert data["width"] == 100
    assert len(data["regions"]) == 1
    assert data["defect_share"] == pytest.approx(result.mask.mean())
    assert "anomalous" in repr(result)


def test_eight_threads_get_what_one_gets(engine: Engine) -> None:
    frames = [noise(seed, *(SIZE if seed % 2 else (50, 70)), 3) for seed in range(16)]
    limits = [10.0 + 5 * seed for seed in range(16)]
    alone = [engine(frame, threshold=limit) for frame, limit in zip(frames, limits, strict=True)]
    start = threading.Barrier(8)

    def work(offset: int) -> None:
        start.wait(30)
        for step in range(40):
            index = (offset * 5 + step) % 16
            result = engine(frames[index], threshold=limits[index])
            assert result.score == alone[index].score
            assert result.threshold == limits[index]
            np.testing.assert_array_equal(result.anomaly_map, alone[index].anomaly_map)
            np.testing.assert_array_equal(result.mask, alone[index].mask)

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(work, offset) for offset in range(8)]:
            job.result(120)


def test_closed_engine_says_so(folder: Path) -> None:
    engine = Engine(folder, backend=CPU)
    late = engine.stream([gray_frame(SIZE)])
    engine.close()
    engine.close()
    for use in (lambda: engine(gray_frame(SIZE)), lambda: engine.stream([]), lambda: next(late), engine.__enter__):
        with pytest.raises(ConfigError, match="closed"):
            use()
    assert "closed" in repr(engine)


def test_close_waits_for_calls_in_flight(folder: Path) -> None:
    engine = Engine(folder, backend=CPU)
    inside, release = threading.Event(), threading.Event()
    infer = engine.backend.infer

    def slow(frames: np.ndarray, threshold: float):
        inside.set()
        assert release.wait(30)
        return infer(frames, threshold)

    engine.backend.infer = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(engine, gray_frame(SIZE))
        assert inside.wait(30)
        closing = pool.submit(engine.close)
        with pytest.raises(ConfigError, match="closed"):
            exhaust(engine.stream([]) for _ in iter(int, 1))
        assert not closing.done()
        release.set()
        assert call.result(30).score == 0.0
        closing.result(30)


def test_stream_keeps_order_and_equals_calls(engine: Engine) -> None:
    frames = [noise(seed, *(SIZE if seed % 3 else (40, 50)), 3) for seed in range(20)]
    expected = [engine(frame, fpr=0.01) for frame in frames]
    for batch_size in (1, 4):
        results = list(engine.stream(iter(frames), fpr=0.01, batch_size=batch_size))
        assert [result.size for result in results] == [frame.shape[:2] for frame in frames]
        for result, single in zip(results, expected, strict=True):
            assert result.score == pytest.approx(single.score, rel=1e-6)
            assert result.threshold == 20.0
            np.testing.assert_allclose(result.anomaly_map, single.anomaly_map, rtol=1e-5, atol=1e-4)


def test_closing_while_a_stream_begins_ends_the_stream(folder: Path) -> None:
    engine = Engine(folder, backend=CPU, threads=1)

    class Slow(weakref.WeakSet):
        def add(self, item: object) -> None:
            closing = threading.Thread(target=engine.close)
            closing.start()
            closing.join(timeout=0.3)  # as if this thread had been put to sleep here
            super().add(item)

    engine._streams = Slow()
    with pytest.raises(ConfigError, match="closed"):
        exhaust(engine.stream([gray_frame(SIZE)] * 3))


def test_stream_takes_frames_from_a_camera_that_reuses_its_memory(engine: Engine) -> None:
    frames = [noise(seed, *SIZE, 3) for seed in range(12)]
    memory = np.empty((*SIZE, 3), np.uint8)

    def camera() -> Iterator[np.ndarray]:
        for frame in frames:
            memory[:] = frame
            yield memory

    for batch_size in (1, 3):
        scores = [result.score for result in engine.stream(camera(), batch_size=batch_size)]
        assert scores == pytest.approx([engine(frame).score for frame in frames], rel=1e-6)


def test_stream_raises_frame_errors_in_their_place(engine: Engine) -> None:
    source = [gray_frame(SIZE), gray_frame(SIZE), np.zeros(SIZE, np.float32), gray_frame(SIZE)]
    seen: list = []
    with pytest.raises(FrameError, match="float32"):
        exhaust(engine.stream(source), seen)
    assert len(seen) == 2
    with pytest.raises(FrameError, match="single frames"):
        list(engine.stream([noise(0, 2, *SIZE, 3)]))


@pytest.mark.parametrize("shape", [(*SIZE, 3), (*SIZE, 1), SIZE, (5,), (), (2, 2, *SIZE, 3)])
def test_stream_refuses_one_array_that_is_no_batch(engine: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(FrameError, match="stream takes"):
        engine.stream(np.zeros(shape, np.uint8))


def test_stream_takes_one_array_of_frames(engine: Engine) -> None:
    frames = noise(31, 3, *SIZE, 3)
    assert [result.score for result in engine.stream(frames)] == [engine(frame).score for frame in frames]
    assert len(list(engine.stream(noise(32, 2, *SIZE, 1)))) == 2


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, 10_000])
def test_stream_batch_size(engine: Engine, batch_size: object) -> None:
    with pytest.raises(ConfigError):
        engine.stream([], batch_size=batch_size)  # type: ignore[arg-type]


def test_close_ends_a_running_stream(folder: Path) -> None:
    engine = Engine(folder, backend=CPU)
    results = engine.stream(gray_frame(SIZE) for _ in iter(int, 1))
    next(results)
    engine.close()
    with pytest.raises(ConfigError, match="closed"):
        exhaust(results)
    assert not [t for t in threading.enumerate() if t.name == "saae-compute"]


def test_weights_with_nan_are_an_error_not_a_clean_frame(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_graph(SIZE))
    for initializer in model.graph.initializer:
        if initializer.name == "kernel":
            kernel = numpy_helper.to_array(initializer).copy()
            kernel[0, 0, 0, 0] = np.nan
            initializer.CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    folder = write_bundle(tmp_path / "nan", tiny_manifest(SIZE), {"model.onnx": model.SerializeToString()}).path
    with Engine(folder, backend=CPU) as engine:
        with pytest.raises(BackendError, match="not finite"):
            engine(gray_frame(SIZE))
        with pytest.raises(BackendError, match="not finite"):
            list(engine.stream([gray_frame(SIZE)]))


def test_takes_an_opened_bundle_and_has_its_manifest(folder: Path) -> None:
    bundle = open_bundle(folder)
    with Engine(bundle, backend=CPU) as engine:
        assert engine.manifest is bundle.manifest
        assert engine.backend.name == CPU
        assert "ONNX Runtime" in engine.backend.description
        assert "model.onnx" in repr(engine)
    with pytest.raises(BundleNotFoundError):
        Engine(folder / "nowhere")


def test_an_old_default_of_the_graph_does_not_matter(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", tiny_manifest(SIZE, 50.0), {"model.onnx": tiny_graph(SIZE, 1.0)}).path
    with Engine(folder, backend=CPU) as engine:
        result = engine(noise(11, *SIZE, 3))
        np.testing.assert_array_equal(result.mask, result.anomaly_map > 50.0)


class OnDevice:
    """Frames as torch or CuPy show them when they lie on a GPU."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (0, False), "version": 3}


def test_frames_on_a_gpu_need_a_backend_that_takes_them(engine: Engine) -> None:
    assert not engine.backend.takes_device_arrays
    with pytest.raises(FrameError, match="lie on a GPU") as caught:
        engine(OnDevice(*SIZE, 3))
    assert "tensorrt" in caught.value.cure
    with pytest.raises(BackendError, match="no outputs on the GPU"):
        engine.backend.infer_on_device(noise(0, 1, *SIZE, 3), 1.0)


def test_frames_on_a_gpu_go_to_the_backend_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(folder, backend=CPU) as engine:
        infer, given = engine.backend.infer, []

        def take(frames: object, threshold: float) -> RawOutputs:
            given.append(frames)
            assert isinstance(frames, OnDevice)
            count = frames.shape[0] if len(frames.shape) == 4 else 1
            return infer(noise(0, count, *SIZE, 3), threshold)

        monkeypatch.setattr(type(engine.backend), "takes_device_arrays", True)
        engine.backend.infer = take  # type: ignore[method-assign]
        one, two = OnDevice(*SIZE, 3), OnDevice(2, *SIZE, 3)
        assert isinstance(engine(one), Result)
        assert len(engine(two, threshold=62.0)) == 2
        assert given == [one, two]


def test_an_engine_opens_the_new_bundle_where_the_old_one_was_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_tiny_bundle(tmp_path / "tiny", SIZE, threshold=40.0)
    original, opened = engine_module.backends.open_backend, []

    def replace_first(bundle: object, *arguments: object, **options: object) -> object:
        opened.append(bundle)
        if len(opened) == 1:
            make_tiny_bundle(place, SIZE, threshold=20.0)
        return original(bundle, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module.backends, "open_backend", replace_first)
    with Engine(place, backend=CPU, threads=1) as engine:
        assert engine.threshold == 20.0
    assert len(opened) == 2


def test_an_engine_in_another_process_is_opened_there(folder: Path) -> None:
    import multiprocessing

    frame = noise(40, *SIZE, 3)
    with Engine(folder, backend=CPU, threads=1, fpr=0.0) as engine:
        expected = engine(frame)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            score, threshold = pool.apply(_score_elsewhere, (engine, frame))
    assert (score, threshold) == (expected.score, 60.0)
    with pytest.raises(ConfigError, match="closed"):
        pickle.dumps(engine)


def _score_elsewhere(engine: Engine, frame: np.ndarray) -> tuple[float, float]:
    result = engine(frame)
    return result.score, result.threshold


def test_sixteen_bit_frames_are_scored_as_their_eight_bits(folder: Path, engine: Engine, tmp_path: Path) -> None:
    frame = noise(5, *SIZE)
    wide = np.ceil(frame * (4095 / 255)).astype(np.uint16)
    with pytest.raises(FrameError, match="uint16"):
        engine(wide)
    manifest = tiny_manifest(SIZE)
    fitted = dataclasses.replace(manifest, frame=dataclasses.replace(manifest.frame, white_level=4095))
    twelve = write_bundle(tmp_path / "twelve", fitted, {"model.onnx": tiny_graph(SIZE)}).path
    for place, given, level in ((folder, 4095, 4095), (twelve, None, 4095), (twelve, 65535, 65535)):
        with Engine(place, backend=CPU, white_level=given) as other:
            assert other.white_level == level
            results = [other(wide), *other.stream([wide]), *other([wide])]
            expected = frame if level == 4095 else np.rint(wide / 257).astype(np.uint8)
            for result in results:
                np.testing.assert_array_equal(result.anomaly_map, engine(expected).anomaly_map)
            np.testing.assert_array_equal(other(frame).anomaly_map, engine(frame).anomaly_map)
    with pytest.raises(ConfigError, match="white level"):
        Engine(folder, backend=CPU, white_level=12)


def test_health_counts_calls_and_failures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(folder, backend=CPU, threads=1) as engine:
        assert engine.health()["counts"] == {"frames": 0, "failed": 0}
        engine(noise(0, *SIZE, 3))
        engine([noise(0, *SIZE, 3), noise(1, 20, 30, 3)])
        health = engine.health()
        assert json.loads(json.dumps(health)) == health
        assert (health["open"], health["counts"]) == (True, {"frames": 3, "failed": 0})
        assert set(health["latency_ms"]) == {"p50", "p95", "p99"}
        assert health["last_error"] is None

        def broken(*_: object) -> None:
            raise BackendError("The device is gone.")

        monkeypatch.setattr(engine.backend, "infer", broken)
        with pytest.raises(BackendError):
            engine(noise(0, *SIZE, 3))
        assert engine.health()["counts"] == {"frames": 3, "failed": 1}
        assert engine.health()["last_error"] == "The device is gone."
    assert not engine.health()["open"]
