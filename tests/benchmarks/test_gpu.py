"""benchmarks/gpu.py: everything about it that needs no GPU; the split runs against a CUDA that keeps a clock."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_backend import make
from fake_cuda import FakeCuda
from needs import need
from tiny_bundle import make_tiny_bundle
from typer import Typer
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu_split import PARTS, Stamps, TimedCuda, split
from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.errors import BackendUnavailableError, ConfigError, DeviceError, ParityError
from saae_runtime.manifest import Artefact


@pytest.fixture
def command():
    app = Typer()
    app.command()(gpu.main)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def bundle(tmp_path):
    return make_tiny_bundle(tmp_path / "tiny", size=(16, 24))


# -- arguments, and no GPU


def test_parts_are_run_in_their_order_and_unknown_ones_refused():
    assert gpu.chosen_parts(None) == gpu.PARTS
    assert gpu.chosen_parts("soak, parity") == ("parity", "soak")
    for text in ("sok", "soak,speed", ","):
        with pytest.raises(ConfigError, match="no part") as caught:
            gpu.chosen_parts(text)
        assert "soak" in caught.value.cure


def test_batch_sizes():
    assert gpu.batch_sizes("1,8,32") == (1, 8, 32)
    for text in ("", "0", "1,x", "1,,2", "-1"):
        with pytest.raises(ConfigError, match="--batch"):
            gpu.batch_sizes(text)


def test_without_a_gpu_it_ends_with_a_word_and_writes_nothing(command, bundle, tmp_path):
    try:
        if CudaApi().driver_version() != (0, 0):
            pytest.skip("this machine has an NVIDIA driver")
    except BackendUnavailableError:
        pass
    done = command(bundle, "--out", tmp_path / "results")
    assert done.exit_code == 2
    assert "NVIDIA driver" in done.output or "cuda-python" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "results").exists()


# -- tables and criteria


@pytest.mark.parametrize(
    ("host", "device", "verdict"),
    [
        ([1000.0, 1001.0, 1019.0], [500.0, 500.0, 500.0], True),
        ([1000.0, 1030.0, 1000.0], [500.0, 500.0, 500.0], False),
        ([1000.0, 990.0, 980.0], [500.0, 504.0, 509.0], False),
        ([1000.0, 990.0, 980.0], [500.0, 508.0, 490.0], True),
    ],
)
def test_flat_is_said_of_host_and_device(host, device, verdict):
    found = gpu.flat([{"resident_mib": a, "device_mib": b} for a, b in zip(host, device, strict=True)])
    assert found["flat"] is verdict
    assert found["host_growth"] == pytest.approx(max(host[1:]) / host[0] - 1, abs=1e-5)
    assert found["device_growth_mib"] == pytest.approx(max(device[1:]) - device[0])


def test_the_share_of_the_matrix_rate():
    def row(precision, kind, batch, fps):
        return {"backend": "tensorrt", "precision": precision, "kind": kind, "batch": batch, "fps": fps}

    data = {
        "matmul_fp16_tflops": 500.0,
        "model": {"gflop_per_frame": 63.0},
        "rows": [row("fp16", "device", 32, 5000.0), row("fp32", "device", 32, 900.0), row("fp16", "frame", 1, 800.0)],
    }
    (found,) = gpu.matrix_share(data)
    assert (found["kind"], found["batch"]) == ("device", 32)
    assert found["tflops"] == 315.0  # 5000 frames of 63 GFLOP a second
    assert found["share"] == 0.63
    assert gpu.matrix_share({**data, "matmul_fp16_tflops": None}) == []


def test_a_fit_is_well_if_it_was_recorded_and_came_to_the_same_loss():
    def data(captured, loss):
        row = dict.fromkeys(
            ("precision", "images_per_second", "ratio", "once_s", "whole_fit_s", "peak_device_gib"), 1.0
        )
        rows = [
            {**row, "way": way, "loss": value, "timing": {"median_ms": 2.0}}
            for way, value in (("saae", loss), ("plain", 2.0), ("plain, backbone", 9.0))
        ]
        return {"model": {"captured": captured}, "rows": rows}

    assert gpu.fit_is_well(data(True, 2.05))
    assert not gpu.fit_is_well(data(False, 2.0))
    for loss in (1.8, 2.2, float("nan")):
        assert not gpu.fit_is_well(data(True, loss))
    rows = gpu.fit_rows("fast", data(True, 2.0))
    assert [(row["preset"], row["way"], row["step_ms"]) for row in rows[:2]] == [
        ("fast", "saae", 2.0),
        ("fast", "plain", 2.0),
    ]


@pytest.mark.needs("torch")
def test_the_fit_is_run_for_both_presets_and_written(command, bundle, tmp_path, monkeypatch):
    from benchmarks import fit as bench

    asked = []

    def run(words, check):
        """benchmarks/fit.py itself, in this process, on the CPU, with a model that takes no time."""
        app = Typer()
        app.command()(bench.main)
        given = list(words[2:])
        asked.append(given[given.index("--preset") + 1])
        assert given[given.index("--device") + 1] == "cuda"
        assert given[given.index("--weights") + 1] == "random"
        for name, value in (("--device", "cpu"), ("--images", "3"), ("--steps", "2")):
            given[given.index(name) + 1] = value
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        return SimpleNamespace(returncode=done.exit_code)

    from saae_train import config as presets

    tiny = presets.FitConfig(
        backbone="test_vit2", layers=(1, 2), input_size=(48, 48), components=24, latent_limit=6, batch=2, steps=3
    )
    monkeypatch.setattr(presets, "PRESETS", {"fast": tiny, "paper": tiny})
    monkeypatch.setattr(gpu, "FITS", {"fast": ("--images", "64"), "paper": ("--images", "64", "--latent", "6")})
    monkeypatch.setattr(gpu, "CudaApi", FakeCuda)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    out = tmp_path / "results"
    done = command(bundle, "--parts", "fit", "--out", out)
    assert asked == ["fast", "paper"]
    assert done.exit_code == 1, done.output  # nothing is recorded on a CPU, and that is found
    assert sorted(path.name for path in out.iterdir()) == ["gpu-fit-fast.json", "gpu-fit-paper.json", "gpu-fit.json"]
    written = json.loads((out / "gpu-fit.json").read_text())
    assert written["passed"] is False
    assert [(row["preset"], row["way"]) for row in written["rows"]] == [
        (name, way) for name in ("fast", "paper") for way in bench.WAYS
    ]


def test_answers_that_differ_between_threads_are_counted():
    frames = list(range(5))
    expected = [(float(item), b"", b"") for item in frames]
    assert gpu.in_threads(lambda item: expected[item], frames, expected, 3) == {
        "threads": 4,
        "calls": 60,
        "different": 0,
    }
    wrong = gpu.in_threads(lambda item: (0.0, b"", b""), frames, expected, 3)
    assert wrong["different"] == 48  # all but those of frame 0

    def fails(item):
        raise DeviceError("The GPU is gone.")

    with pytest.raises(DeviceError, match="gone"):
        gpu.in_threads(fails, frames, expected, 1)


# -- the split


class Clock(Stamps, FakeCuda):
    """A copy in takes 2 ms, a computation 5, each of the three copies out 1; marks take none."""

    def __init__(self, **options):
        super().__init__(**options)
        self._ms, self._cost, self._reached = 0.0, 5.0, {}

    def elapsed_ms(self, start, end):
        return self._reached[end] - self._reached[start]

    def enqueue(self, stream, work, wait=None):
        cost = self._cost

        def timed():
            work()
            self._ms += cost

        super().enqueue(stream, work if self.capturing == stream else timed, wait)

    def _copy(self, name, *arguments):
        self._at(2.0 if name == "copy_in" else 1.0, super()._copy, name, *arguments)

    def copy_in(self, *arguments):
        self._at(0.0, super().copy_in, *arguments)  # the mark before it

    def record(self, event, stream):
        self._at(0.0, super().record, event, stream)

    def wait(self, stream, event):
        self._at(0.0, super().wait, stream, event)

    def _at(self, cost, call, *arguments):
        before, self._cost = self._cost, cost
        try:
            call(*arguments)
        finally:
            self._cost = before

    def _reach(self, event, times):
        super()._reach(event, times)
        self._reached[event] = self._ms


@pytest.mark.parametrize("graph", [False, True])
def test_the_split_names_each_parts_time(graph):
    cuda = Clock(seed=3)
    backend, _ = make(cuda, slots=1, cuda_graph=graph, warm_up=True, profile=(1, 2, 4))
    rows = split(backend, cuda, (1, 4, 8), runs=5, warm_up=3)
    assert [row["batch"] for row in rows] == [1, 4]  # 8 is above the engine
    for row in rows:
        assert [row[f"{name}_ms"] for name in PARTS] == [2.0, 5.0, 3.0]
        assert [row[f"{name}_share"] for name in PARTS] == [0.2, 0.5, 0.3]
        assert row["total_ms"] == 10.0
        assert row["runs"] == 5
    backend.close()


def test_the_real_clock_calls_what_the_installed_wheel_has():
    runtime = need("cuda.bindings.runtime")
    for name in ("cudaEventCreateWithFlags", "cudaEventDefault", "cudaEventElapsedTime"):
        assert hasattr(runtime, name)
    cuda = TimedCuda()
    if cuda.driver_version() == (0, 0):
        for call in (cuda.event, lambda: cuda.elapsed_ms(3, 4)):
            with pytest.raises(DeviceError):  # its arguments were taken; there is only no driver
                call()


# -- parts that run on any backend


@pytest.mark.needs("onnx")
def test_an_engine_that_disagrees_is_not_well_and_a_missing_library_is_no_fault(command, bundle, tmp_path, monkeypatch):
    from saae_export.tensorrt import compile as engines
    from saae_export.tensorrt import gate as engine_parity

    installed = set()

    def build(bundle, *, library, options):
        if library not in installed:
            raise BackendUnavailableError(f"{library} is not installed.")
        file = Artefact("one.engine", "engine", "fp16", library=library, library_version="10.3.0", sm="sm89")
        return engines.BuiltEngine(bundle, file, engines.CompiledEngine(b"", None, None, 1.0))

    def gate(built):
        raise ParityError("one.engine disagrees with PyTorch FP32.")

    monkeypatch.setattr(gpu, "CudaApi", FakeCuda)
    monkeypatch.setattr(engines, "build_engine", build)
    monkeypatch.setattr(engine_parity, "gate", gate)
    for code in (0, 1):
        done = command(bundle, "--parts", "engine", "--out", tmp_path / "results")
        assert done.exit_code == code, done.output
        written = json.loads((tmp_path / "results" / "gpu-engine.json").read_text())
        assert written["passed"] is (code == 0)
        installed.add("tensorrt")
    assert written["rows"][0]["parity"] is False
    assert "disagrees" in written["rows"][0]["said"]


@pytest.mark.needs("onnxruntime")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_soak_and_threads_run_and_are_written(command, bundle, tmp_path, monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(gpu, "CudaApi", lambda: cuda)
    monkeypatch.setattr(gpu, "_noise", lambda engine, count: list(np.zeros((2, 16, 24, 3), np.uint8)))
    out = tmp_path / "results"
    words = (bundle, "--parts", "threads,soak", "--frames", "120", "--backend", "onnxruntime:cpu", "--out", out)
    done = command(*words)
    assert done.exit_code in (0, 1), done.output  # so few calls may still grow
    soak = json.loads((out / "gpu-soak.json").read_text())
    assert soak["rows"][0]["call"] == 30
    assert soak["rows"][-1]["call"] == 120
    assert {row["device_mib"] for row in soak["rows"]} == {4096.0}
    assert soak["gpu"] == "Fake GPU (sm89)"
    threads = json.loads((out / "gpu-threads.json").read_text())
    assert threads["rows"][0]["different"] == 0
    assert threads["passed"] is True
    steady, free = done.exit_code, [4 << 30]

    def leaking():
        free[0] -= 4 << 20
        return free[0], 8 << 30

    monkeypatch.setattr(cuda, "memory_info", leaking)
    done = command(*words)
    assert done.exit_code == 1 >= steady
    assert json.loads((out / "gpu-soak.json").read_text())["flat"] is False
