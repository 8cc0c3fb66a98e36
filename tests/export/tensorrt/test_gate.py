"""Engines that this machine can run are compared and their manifest says so: at build, engine and verify."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fake_backend import SIZE, frames
from fake_cuda import FakeCuda, expected_map, fake_tensorrt
from tiny_bundle import tiny_manifest
from typer.testing import CliRunner

from saae_export.parity import verify as verify_module
from saae_export.parity.verify import Skipped, verify
from saae_export.tensorrt.compile import BuiltEngine, CompiledEngine, EngineOptions, engine_file
from saae_export.tensorrt.gate import gate
from saae_export.tensorrt.network import NetworkInfo
from saae_runtime.backends.tensorrt import choose as backend_module
from saae_runtime.backends.tensorrt import library as trt_library
from saae_runtime.backends.tensorrt.library import TrtLibrary
from saae_runtime.bundle import open_bundle, update_bundle, write_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    DeviceError,
    EngineIncompatibleError,
    ParityError,
    StorageError,
)
from saae_runtime.manifest import Artefact, Profile
from saae_runtime.reference import ReferenceFrame, write_reference


class Gpu:
    """A fake GPU with a fake TensorRT; `compute` is what its engines compute."""

    def __init__(self):
        self.cuda = FakeCuda()
        self.compute = expected_map
        self.size = SIZE

    def module(self):
        def change(engine):
            engine.compute = self.compute

        return fake_tensorrt(self.cuda, size=self.size, change=change)


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    library = TrtLibrary("tensorrt", made.module())
    monkeypatch.setitem(trt_library._loaded, "tensorrt", library)
    monkeypatch.setattr(backend_module, "CudaApi", lambda: made.cuda)
    return made


def artefact(sm="sm89", precision="fp16"):
    file = engine_file("tensorrt", "10.3.0", sm, precision, EngineOptions())
    return Artefact(file, "engine", precision, library="tensorrt", library_version="10.3.0", sm=sm)


def with_engine(bundle, engine):
    """The bundle with an engine that the fake TensorRT takes."""
    manifest = dataclasses.replace(bundle.manifest, artefacts=(*bundle.manifest.artefacts, engine))
    return update_bundle(bundle, manifest, {engine.file: b"engine"})


@pytest.fixture
def bundle(tmp_path):
    """A bundle with reference frames that `expected_map` answers, and no artefact yet."""
    manifest = dataclasses.replace(tiny_manifest(size=SIZE, threshold=0.4, precisions=("fp16",)), artefacts=())

    def fill(folder):
        stored = [
            ReferenceFrame(f"{number}.png", frame, expected_map(frame), float(expected_map(frame).max()))
            for number, frame in enumerate(frames(3))
        ]
        write_reference(folder, stored, "PyTorch FP32")

    return write_bundle(tmp_path / "bundle", manifest, fill)


def built(bundle, engine):
    compiled = CompiledEngine(b"engine", NetworkInfo((), (), 0, {}), None, 0.0)
    return BuiltEngine(with_engine(bundle, engine), engine, compiled)


def wrong(batch):
    return expected_map(batch) * np.float32(1.5)


# -- saae-export engine


def test_a_new_engine_is_compared_and_its_manifest_says_so(bundle, gpu):
    found = gate(built(bundle, artefact()))
    assert found.passed
    (kept,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert kept.parity == found.summary()
    assert (kept.parity.images, kept.parity.flips) == (3, 0)
    assert "PyTorch FP32" in kept.parity.reference
    assert set(gpu.cuda.live().values()) == {0}


def test_a_new_engine_that_disagrees_is_not_kept(bundle, gpu):
    gpu.compute = wrong
    made = built(bundle, artefact())
    with pytest.raises(ParityError, match=r"b1-1-8\.engine disagrees"):
        gate(made)
    opened = open_bundle(bundle.path)
    assert opened.manifest.artefacts == ()
    assert made.artefact.file not in opened.manifest.files


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineIncompatibleError("It has other inputs.")])
def test_an_engine_that_could_not_be_compared_takes_the_place_of_none(bundle, gpu, monkeypatch, error):
    """Stopped in the middle, or no engine of this graph: the one that had passed comes back."""
    passed = dataclasses.replace(artefact(), file="earlier.engine")
    made = built(with_engine(bundle, passed), artefact())
    without = tuple(item for item in made.bundle.manifest.artefacts if item.file != passed.file)
    replaced = update_bundle(
        made.bundle, dataclasses.replace(made.bundle.manifest, artefacts=without), {}, drop=(passed.file,)
    )
    made = dataclasses.replace(made, bundle=replaced, before=(passed,), files={passed.file: b"engine"})

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(verify_module, "Engine", stop)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        gate(made)
    assert [item.file for item in open_bundle(bundle.path).manifest.artefacts] == [passed.file]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("fault", ["wrong", "unsteady"])
def test_an_engine_that_is_wrong_at_one_batch_size_is_not_kept(bundle, gpu, size, fault):
    """As reported of TensorRT 10.3 and 10.4 with vision transformers of DINO's kind."""
    runs = []

    def compute(batch):
        runs.append(len(batch))
        if len(batch) != size:
            return expected_map(batch)
        if fault == "wrong":
            return wrong(batch)
        return expected_map(batch) * np.float32(1 + 1e-6 * runs.count(size))

    gpu.compute = compute
    made = built(bundle, dataclasses.replace(artefact(), profile=Profile(1, 2, 5)))
    with pytest.raises(ParityError, match="a different map each time" if fault == "unsteady" else "disagrees"):
        gate(made)
    assert open_bundle(bundle.path).manifest.artefacts == ()


def test_every_stored_frame_is_compared_in_every_batch_size_three_times(bundle, gpu):
    seen = {}

    def compute(batch):
        for frame in batch:
            seen.setdefault(len(batch), []).append(frame.tobytes())
        return expected_map(batch)

    gpu.compute = compute
    assert gate(built(bundle, dataclasses.replace(artefact(), profile=Profile(1, 2, 5)))).passed
    for size in (1, 2, 5):
        for frame in frames(3):
            assert seen[size].count(frame.tobytes()) >= 3


@pytest.mark.parametrize("max_batch", [8, 4])  # the first has the old one's name
def test_what_a_failed_engine_replaced_is_back(bundle, gpu, monkeypatch, max_batch):
    from saae_export.tensorrt import compile as engines

    old = dataclasses.replace(artefact(), options={"source": "model.fp16.onnx"})
    manifest = dataclasses.replace(bundle.manifest, artefacts=(Artefact("model.fp16.onnx", "onnx", "fp16"), old))
    bundle = update_bundle(bundle, manifest, {"model.fp16.onnx": b"graph", old.file: b"engine"})
    compiled = CompiledEngine(b"engine, anew", NetworkInfo((), (), 0, {}), None, 0.0)
    monkeypatch.setattr(engines, "onnx_for_tensorrt", lambda path: b"")
    monkeypatch.setattr(engines, "_targets", lambda *_: ("sm89",))
    monkeypatch.setattr(engines, "CudaApi", lambda: gpu.cuda)
    monkeypatch.setattr(engines, "compile_engine", lambda *_, **__: compiled)
    made = engines.build_engine(bundle, options=EngineOptions(max_batch=max_batch))
    assert [item.file for item in made.bundle.artefacts(kind="engine")] == [made.artefact.file]
    monkeypatch.setattr("saae_export.tensorrt.gate.compare_engine", _no_numbers)
    with pytest.raises(BackendError, match="not finite"):
        gate(made)
    opened = open_bundle(bundle.path)
    assert opened.artefacts(kind="engine") == (old,)
    assert opened.file(old.file).read_bytes() == b"engine"
    assert (made.artefact.file in opened.manifest.files) == (made.artefact.file == old.file)


def _no_numbers(*_):
    raise BackendError("Its outputs are not finite.")


def test_a_new_engine_that_gives_no_numbers_is_not_kept(bundle, gpu):
    gpu.compute = lambda batch: np.full_like(expected_map(batch), np.nan)
    with pytest.raises(BackendError, match="not finite"):
        gate(built(bundle, artefact()))
    assert open_bundle(bundle.path).manifest.artefacts == ()


def test_exactly_the_new_engine_is_compared_and_not_another_that_fits(bundle, gpu, monkeypatch):
    other = dataclasses.replace(artefact(), file="older.engine")
    made = built(with_engine(bundle, other), artefact())
    opened, original = [], backend_module._open

    def spy(bundle, flavour, engine, *rest):
        opened.append(engine.file)
        return original(bundle, flavour, engine, *rest)

    monkeypatch.setattr(backend_module, "_open", spy)
    gate(made)
    assert opened == [made.artefact.file]
    parity = {item.file: item.parity for item in open_bundle(bundle.path).artefacts(kind="engine")}
    assert parity[other.file] is None
    assert parity[made.artefact.file] is not None


@pytest.mark.parametrize("why", ["another GPU", "no frames", "no memory"])
def test_where_it_cannot_be_compared_it_is_kept_and_said(bundle, gpu, why):
    engine = artefact("sm120" if why == "another GPU" else "sm89")
    if why == "no frames":
        bundle = update_bundle(bundle, bundle.manifest, {}, drop=tuple(bundle.manifest.files))
    if why == "no memory":
        gpu.cuda.fail["malloc"] = DeviceError("The GPU is out of memory: 1.0 MiB were asked for.")
    found = gate(built(bundle, engine))
    assert isinstance(found, Skipped)
    assert {"another GPU": "sm120", "no frames": "--data", "no memory": "out of memory"}[why] in found.why
    (kept,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert kept.parity is None


def test_the_command_compares_and_ends_with_3_where_it_fails(bundle, gpu, monkeypatch):
    import typer

    from saae_export.cli import engine as cli_engine
    from saae_runtime.terminal import GuardedGroup

    app = typer.Typer(cls=GuardedGroup, pretty_exceptions_enable=False)
    cli_engine.add_commands(app)
    monkeypatch.setattr(cli_engine, "build_engine", lambda path, **_: built(open_bundle(path), artefact()))
    done = CliRunner().invoke(app, ["engine", str(bundle.path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "pass" in done.output
    gpu.compute = wrong
    done = CliRunner().invoke(app, ["engine", str(bundle.path), "--quiet"])
    assert done.exit_code == 3
    assert "ParityError" in done.output


# -- verify


def test_verify_gives_an_engine_from_elsewhere_its_parity_once(bundle, gpu):
    with_engine(bundle, artefact())
    found = verify(bundle.path)
    assert found.recorded == (artefact().file,)
    (kept,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert kept.parity is not None
    assert kept.parity.passed
    before = (bundle.path / "manifest.json").stat().st_mtime_ns
    again = verify(bundle.path)
    assert again.recorded == ()
    assert len(again.reports) == 1
    assert (bundle.path / "manifest.json").stat().st_mtime_ns == before


def test_verify_writes_down_that_an_engine_failed(bundle, gpu):
    with_engine(bundle, artefact())
    gpu.compute = wrong
    found = verify(bundle.path)
    assert not found.reports[0].passed
    (kept,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert not kept.parity.passed


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("fault", ["wrong", "unsteady"])
def test_verify_writes_down_that_an_engine_from_elsewhere_fails_in_batches(bundle, gpu, size, fault):
    with_engine(bundle, dataclasses.replace(artefact(), profile=Profile(1, 2, 5)))
    runs = []

    def compute(batch):
        runs.append(len(batch))
        factor = 1.5 if fault == "wrong" else 1 + 1e-6 * runs.count(size)
        return expected_map(batch) * np.float32(factor if len(batch) == size else 1)

    gpu.compute = compute
    found = verify(bundle.path)
    assert not found.reports[0].passed
    (kept,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert not kept.parity.passed
    assert kept.parity.worst_image.endswith(f"in a batch of {size}")
    with pytest.warns(UserWarning, match="disagreed"), pytest.raises(BackendUnavailableError):
        Engine(bundle.path)


def test_auto_does_not_take_an_engine_that_failed(bundle, gpu):
    with_engine(bundle, artefact())
    with Engine(bundle.path) as engine:
        assert engine.backend.name == "tensorrt"
    gpu.compute = wrong
    verify(bundle.path)
    with pytest.warns(UserWarning, match=r"b1-1-8\.engine disagreed"), pytest.raises(BackendUnavailableError) as caught:
        Engine(bundle.path)  # the bundle has nothing else
    assert "disagreed with PyTorch FP32" in caught.value.why
    with Engine(bundle.path, backend="tensorrt") as engine:  # by name it is still there to be looked at
        assert engine.backend.name == "tensorrt"


def test_verify_compares_every_engine_that_runs_here(bundle, gpu):
    with_engine(with_engine(bundle, artefact()), dataclasses.replace(artefact(), file="second.engine"))
    found = verify(bundle.path)
    assert [report.artefact for report in found.reports] == [
        f"{artefact().file} (tensorrt)",
        "second.engine (tensorrt)",
    ]


def test_a_bundle_that_cannot_be_written_to_is_verified_all_the_same(bundle, gpu, monkeypatch):
    with_engine(bundle, artefact())

    def read_only(*_, **__):
        raise StorageError("Could not write there.")

    from saae_export.parity import verify as module

    monkeypatch.setattr(module, "update_bundle", read_only)
    said = []
    found = verify(bundle.path, note=said.append)
    assert found.reports[0].passed
    assert found.recorded == ()
    assert "not recorded: Could not write there." in said


# -- saae-export build


@pytest.mark.needs("torch", "onnxruntime")
def test_build_compares_its_engine_with_pytorch_and_keeps_the_parity(tmp_path, gpu, monkeypatch):
    from tiny_builds import draw, options, quiet_build

    from saae_export.graph.onnx_file import run_onnx, session
    from saae_export.pipeline import graphs as build_module

    gpu.size = (96, 80)
    monkeypatch.setitem(trt_library._loaded, "tensorrt", TrtLibrary("tensorrt", gpu.module()))

    def fake_build(opened, *, library, precision, console):
        (graph,) = opened.artefacts(kind="onnx", precision=precision)
        ran = session(opened.file(graph.file).read_bytes())
        gpu.compute = lambda batch: run_onnx(ran, batch)["anomaly_map"]
        engine = artefact(precision=precision)
        return built(opened, engine)

    monkeypatch.setattr(build_module, "build_engine", fake_build)
    data = draw(tmp_path / "data")
    result, _ = quiet_build(options(data, tmp_path / "work", engines=("tensorrt",)))
    (engine,) = result.bundle.artefacts(kind="engine")
    assert engine.parity is not None
    assert engine.parity.passed
    assert engine.parity.reference == "PyTorch FP32"
    assert engine.parity.map_rel_error > 0  # another computation than the reference's
    report = (result.bundle.path / "report.html").read_text(encoding="utf-8")
    assert engine.file in report


@pytest.mark.needs("torch")
def test_a_build_ends_where_its_engine_is_wrong_in_batches(bundle, gpu, tmp_path):
    from PIL import Image
    from rich.console import Console

    from saae_export.pipeline import graphs as build_graphs
    from saae_runtime.result import Scored
    from saae_runtime.terminal import Stages
    from saae_train.data.sample import Sample

    samples = []
    for number, frame in enumerate(frames(3)):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
        samples.append(Sample(tmp_path / f"{number}.png", "good", None, False))
    made = with_engine(bundle, dataclasses.replace(artefact(), profile=Profile(1, 2, 5)))

    def compared():
        reference = lambda frame: Scored(float(expected_map(frame).max()), expected_map(frame))  # noqa: E731
        return build_graphs.check_parity(made, reference, samples, ("fp16",), "", Stages(Console(quiet=True), 1))

    (report,) = compared().reports
    assert report.passed
    gpu.compute = lambda batch: wrong(batch) if len(batch) == 2 else expected_map(batch)
    with pytest.raises(ParityError, match="engine disagrees") as caught:
        compared()
    assert "in a batch of 2" in caught.value.why


@pytest.mark.needs("torch")
def test_a_build_ends_where_its_engine_gives_no_numbers(bundle, monkeypatch):
    """And goes on where the engine is for another machine."""
    from rich.console import Console

    from saae_export.pipeline import graphs as build_graphs
    from saae_runtime.errors import EngineIncompatibleError
    from saae_runtime.terminal import Stages

    made = with_engine(bundle, artefact())
    stages = Stages(Console(quiet=True), 1)

    def compared():
        return build_graphs.check_parity(made, None, (), ("fp32", "fp16"), "", stages)

    def elsewhere(*_):
        raise EngineIncompatibleError("It is for another GPU.")

    monkeypatch.setattr(build_graphs, "open_artefact", elsewhere)
    assert compared().not_compared == {artefact().file: "It is for another GPU."}
    monkeypatch.setattr(build_graphs, "open_artefact", _no_numbers)
    with pytest.raises(BackendError, match="not finite"):
        compared()
