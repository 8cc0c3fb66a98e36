"""A real Triton server, by HTTP and gRPC, says what the local engine says, bit for bit; and how it fails."""

from __future__ import annotations

import copy
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import triton_server
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle, tiny_manifest
from triton_server import Installed, Serving, in_environment, serve

from saae_export.triton.config import ServerOptions
from saae_export.triton.repository import export_triton
from saae_runtime import Engine, TritonEngine
from saae_runtime.bundle import write_bundle
from saae_runtime.errors import BackendError, BackendUnavailableError, ConfigError, FrameError

pytestmark = [pytest.mark.slow, pytest.mark.needs("tritonclient", "onnxruntime")]

SIZE = (64, 96)
FUSED = (80, 100)
MODELS = ("tiny", "tiny_python", "fused", "fused_python")
PROTOCOLS = ("grpc", "http")


@dataclass(frozen=True)
class Running:
    server: Serving
    bundles: dict[str, Path]

    def open(self, model: str, protocol: str = "grpc", **options: object) -> TritonEngine:
        return TritonEngine(self.server.url(protocol), model, **options)  # type: ignore[arg-type]

    def local(self, model: str) -> Engine:
        return Engine(self.bundles[model.partition("_")[0]], backend="onnxruntime:cpu", threads=1)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return triton_server.install(tmp_path_factory.mktemp("triton"))


def fused_bundle(folder: Path) -> Path:
    """A bundle with the fused graph of a small model of random weights, and thresholds amid its scores."""
    need("torch")
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    graph = FusedGraph(tiny_detector(components=48, smoothing=0.5, score="cosine"), FUSED)
    path = export_onnx(graph, folder / "model.onnx", 0.5)
    bundle = write_bundle(folder / "bundle", tiny_manifest(FUSED), {"model.onnx": path})
    with Engine(bundle, backend="onnxruntime:cpu") as engine:
        scores = [engine(frame).score for frame in frames(FUSED)]
    return write_bundle(folder / "bundle", tiny_manifest(FUSED, float(np.median(scores))), {"model.onnx": path}).path


def frames(size: tuple[int, int]) -> list[np.ndarray]:
    """Clean and spotted ones, noise, a gray one, and two of other sizes than the model's."""
    height, width = size
    noise = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    return [
        gray_frame(size),
        gray_frame(size, spot=(10, 20, 12, 16)),
        noise,
        noise[:, :, 0],
        gray_frame((2 * height, width + 7), spot=(3, 4, 50, 60)),
        noise[: height // 2],
    ]


@pytest.fixture(scope="module")
def running(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    bundles = {"tiny": make_tiny_bundle(folder / "tiny", SIZE), "fused": fused_bundle(folder)}
    served = folder / "served"
    options = ServerOptions(max_batch=4, queue_delay=20_000, threads=1)
    for name, bundle in bundles.items():
        for kind, model in (("onnx", name), ("python", f"{name}_python")):
            (written,), _ = export_triton(
                bundle,
                folder / "repository",
                name=model,
                kinds=[kind],
                options=options,
                backend="onnxruntime:cpu",
                environment=str(installed.environment),
            )
            shutil.copytree(written.folder, served / model)
            if kind == "onnx":
                in_environment(served / model / "config.pbtxt", installed.environment)
    wrong = served / "wrong"  # as if another model had come in this one's place
    shutil.copytree(served / "tiny", wrong)
    text = (wrong / "config.pbtxt").read_text().replace('name: "tiny"', 'name: "wrong"')
    (wrong / "config.pbtxt").write_text(re.sub(r'(\\"score\\": )(\d)', r"\g<1>9\2", text))
    foreign = served / "foreign"
    shutil.copytree(served / "tiny", foreign)
    text = (foreign / "config.pbtxt").read_text().replace('name: "tiny"', 'name: "foreign"')
    (foreign / "config.pbtxt").write_text(text.replace('key: "saae"', 'key: "other"'))
    with serve(installed, served, folder) as server:
        yield Running(server, bundles)


def same(found, expected) -> None:
    assert found.score == expected.score
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_every_result_is_the_local_engines(running: Running, model: str, protocol: str) -> None:
    with running.local(model) as local, running.open(model, protocol) as remote:
        size = local.backend.frame_size
        assert remote.backend.frame_size == size
        assert (remote.threshold, remote.image_threshold) == (local.threshold, local.image_threshold)
        given = frames(size)
        verdicts = set()
        for frame in given:
            same(remote(frame), local(frame))
            verdicts.add(remote(frame).is_anomalous)
            other = {"threshold": 0.7 * local.threshold, "image_fpr": 0.01}
            same(remote(frame, **other), local(frame, **other))
        assert verdicts == {True, False}
        batch = np.stack([frame for frame in given if frame.shape == (*size, 3)])
        for found, expected in zip(remote(batch), local(batch), strict=True):
            same(found, expected)
        assert remote(given[1]).heatmap().shape == (*size, 3)
        assert "triton 2." in remote.explain()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_more_frames_than_one_batch_takes(running: Running, protocol: str) -> None:
    with running.local("tiny") as local, running.open("tiny", protocol) as remote:
        assert remote.backend.max_batch == 4
        given = frames(SIZE) * 3
        for found, expected in zip(remote(given), local(given), strict=True):
            same(found, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["tiny", "tiny_python"])
def test_a_stream_keeps_the_order(running: Running, model: str, protocol: str) -> None:
    with running.local(model) as local, running.open(model, protocol, slots=3) as remote:
        given = frames(SIZE) * 6
        found = list(remote.stream(iter(given)))
        assert len(found) == len(given)
        for one, frame in zip(found, given, strict=True):
            same(one, local(frame))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_verdict_asks_for_the_score_alone(running: Running, protocol: str, monkeypatch) -> None:
    with running.local("fused") as local, running.open("fused", protocol) as remote:
        asked = []
        infer = remote._server._connection.infer

        def spy(model, version, batch, wanted):
            asked.append(tuple(wanted))
            return infer(model, version, batch, wanted)

        monkeypatch.setattr(remote._server._connection, "infer", spy)
        given = frames(FUSED)
        for frame, verdict in zip(given, remote.verdict(given), strict=True):
            expected = local(frame)
            assert verdict.score == pytest.approx(expected.score, rel=1e-5)  # a batch of a different size
            one = remote.verdict(frame)
            assert (one.score, one.rank) == (expected.score, expected.rank)
            assert (one.is_anomalous, one.reason) == (expected.is_anomalous, expected.reason)
            assert not remote.verdict(frame, image_threshold=1e6).is_anomalous
        assert set(asked) == {("score",)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_engine_for_many_threads(running: Running, protocol: str) -> None:
    with running.local("tiny") as local, running.open("tiny_python", protocol) as remote:
        given = frames(SIZE)
        expected = [local(frame) for frame in given]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(remote, given * 8))
        for index, result in enumerate(found):
            same(result, expected[index % len(given)])


def test_the_server_joins_requests_to_batches(running: Running) -> None:
    def counts() -> tuple[float, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{running.server.metrics}/metrics") as answer:
            text = answer.read().decode()
        found = [
            re.search(rf'^nv_inference_{name}{{model="tiny_python",version="1"}} (\S+)', text, re.MULTILINE)
            for name in ("count", "exec_count")
        ]
        assert all(found)
        return float(found[0][1]), float(found[1][1])  # type: ignore[index]

    with running.open("tiny_python", verify=False) as remote:
        before = counts()
        start = threading.Barrier(4)

        def score(_: int) -> float:
            start.wait()
            return float(remote(gray_frame(SIZE)).score)

        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                list(pool.map(score, range(4)))
        end = time.monotonic() + 20
        while counts()[0] - before[0] < 80 and time.monotonic() < end:
            time.sleep(0.05)  # the server counts after it has answered
        frames_scored, batches = (after - first for after, first in zip(counts(), before, strict=True))
    assert frames_scored == 80
    assert batches < 80


def test_the_load_test_counts_what_the_server_answers(running: Running) -> None:
    from benchmarks.served import measure

    with running.open("tiny") as remote:
        rows = measure(remote, [1, 3], 0.3)
    assert [(row["request"], row["clients"]) for row in rows] == [
        ("result", 1), ("result", 3), ("verdict", 1), ("verdict", 3),
    ]  # fmt: skip
    for row in rows:
        assert row["requests"] > 0
        assert row["frames_per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_another_process_opens_its_own(running: Running) -> None:
    with running.open("tiny", image_threshold=12.5) as remote:
        again = copy.copy(remote)  # by `__reduce__`, as multiprocessing does
        with again:
            assert again.image_threshold == 12.5
            same(again(gray_frame(SIZE)), remote(gray_frame(SIZE)))


# --- how it fails ---


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_is_not_there(running: Running, protocol: str) -> None:
    with pytest.raises(ConfigError, match="nonsense") as caught:
        running.open("nonsense", protocol)
    assert "fused_python" in caught.value.why
    with pytest.raises(ConfigError, match="nonsense"):
        running.open("nonsense", protocol, wait=0.5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_gives_other_scores_is_refused(running: Running, protocol: str) -> None:
    with pytest.raises(BackendError, match="wrong scores"):
        running.open("wrong", protocol)
    with running.open("wrong", protocol, verify=False) as remote:
        assert remote.verdict(gray_frame(SIZE)).score == 0.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_of_somebody_else_is_refused(running: Running, protocol: str) -> None:
    with pytest.raises(ConfigError, match="not written by saae"):
        running.open("foreign", protocol)


def test_bad_frames_and_a_closed_engine_are_refused_as_by_the_local_one(running: Running) -> None:
    with running.open("tiny") as remote:
        with pytest.raises(FrameError):
            remote(np.zeros((8, 8, 3), np.float32))
        with pytest.raises(FrameError):
            remote.verdict(np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(ConfigError, match="closed"):
        remote(gray_frame(SIZE))
    with pytest.raises(ConfigError, match="closed"):
        remote.verdict(gray_frame(SIZE))
    remote.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_goes_away_and_comes_back(
    running: Running, installed: Installed, tmp_path: Path, protocol: str
) -> None:
    (written,), _ = export_triton(
        running.bundles["tiny"], tmp_path, kinds=["python"], environment=str(installed.environment)
    )
    repository = written.folder.parent
    with serve(installed, repository, tmp_path) as server:
        remote = TritonEngine(server.url(protocol), "tiny", timeout=4)
        expected = remote(gray_frame(SIZE))
        started = time.monotonic()
        with server.frozen(), pytest.raises(BackendUnavailableError, match="answers"):
            remote(gray_frame(SIZE))
        assert time.monotonic() - started < 30
    with pytest.raises(BackendUnavailableError, match="answers"):
        remote(gray_frame(SIZE))
    with pytest.raises(BackendUnavailableError):
        list(remote.stream([gray_frame(SIZE)] * 3))
    with pytest.raises(BackendUnavailableError):
        TritonEngine(server.url(protocol), "tiny", wait=0.3)
    with serve(installed, repository, tmp_path, ports=(server.http, server.grpc, server.metrics)):
        end = time.monotonic() + 20
        while True:  # gRPC waits a little before it connects again
            try:
                same(remote(gray_frame(SIZE)), expected)
                break
            except BackendUnavailableError:
                assert time.monotonic() < end
                time.sleep(0.2)
    remote.close()
