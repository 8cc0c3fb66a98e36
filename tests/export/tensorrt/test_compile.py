"""Engines built for real, without a GPU, by TensorRT for RTX; and what is refused with which words."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from needs import need
from rich.console import Console
from tiny_bundle import make_tiny_bundle, tiny_graph
from typer.testing import CliRunner

from saae_export.doctor import run_probe
from saae_export.tensorrt import compile as compile_module
from saae_export.tensorrt.compile import EngineOptions, build_engine, compile_engine, engine_file
from saae_export.tensorrt.network import onnx_for_tensorrt, parse_network
from saae_export.tensorrt.progress import BuildProgress
from saae_runtime.backends.cuda.api import CudaApi
from saae_runtime.backends.tensorrt import choose as backend_module
from saae_runtime.backends.tensorrt.library import TrtLibrary
from saae_runtime.bundle import open_bundle, update_bundle
from saae_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    BundleCorruptError,
    ConfigError,
    DeviceError,
    StorageError,
)

SIZE = (16, 24)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "tiny", size=SIZE, precisions=("fp32", "fp16"))


def without_gpu():
    try:
        return CudaApi().driver_version() == (0, 0)
    except BackendUnavailableError:
        return True


def signature(tensors):
    return {tensor.name: (tensor.dtype.name, tensor.shape) for tensor in tensors}


# -- real builds


@pytest.fixture(scope="module", params=["fp32", "fp16", "fp32 memory", "fp16 memory", "fp32 tiles"])
def fused(request, tmp_path_factory):
    """A precision, and the fused graph of a tiny model in it: plain, with a memory, with tiles."""
    need("torch")
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    precision, _, special = request.param.partition(" ")
    options = {"components": 48, "smoothing": 0.5, "score": "cosine"}
    if special == "memory":
        options |= {"score": "memory", "memory": 14}
    if special == "tiles":  # the graph that the tests of the exporter have, too
        options = {"components": 24, "score": "cosine", "size": (96, 80), "layers": (0, 1), "tiles": (2, 2)}
    detector = tiny_detector(**options)
    path = tmp_path_factory.mktemp(precision) / "model.onnx"
    return precision, export_onnx(FusedGraph(detector, (80, 100), precision), path, 0.5)


@pytest.mark.parametrize("sm", ["sm89", "sm120"])
def test_the_fused_graph_is_built_for_another_machines_gpu(rtx, fused, sm):
    precision, path = fused
    options = EngineOptions(min_batch=1, opt_batch=2, max_batch=6)
    built = compile_engine(rtx, onnx_for_tensorrt(path), name=path.name, sms=(sm,), options=options)
    assert len(built.data) > 100_000
    assert signature(built.network.inputs) == {"frame": ("uint8", (-1, 80, 100, 3)), "threshold": ("float32", (1,))}
    assert signature(built.network.outputs) == {
        "anomaly_map": ("float32", (-1, 80, 100)),
        "score": ("float32", (-1,)),
        "mask": ("uint8", (-1, 80, 100)),
    }
    halves = built.network.dtypes.get("float16", 0)
    assert halves > 50 if precision == "fp16" else halves == 0  # strong typing: the graph's own types and no others


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True)])
def test_an_fp32_graph_is_not_rounded_to_tf32(rtx, bundle, monkeypatch, precision, allowed):
    from saae_export.tensorrt import compile as engines

    seen = []

    class Spy:
        """The builder, which tells the flags that it is given."""

        def __init__(self, builder):
            self._builder = builder

        def __getattr__(self, name):
            return getattr(self._builder, name)

        def build_serialized_network(self, network, config):
            seen.append(config.get_flag(rtx.module.BuilderFlag.TF32))
            return self._builder.build_serialized_network(network, config)

    class Module:
        def __getattr__(self, name):
            return (lambda logger: Spy(rtx.module.Builder(logger))) if name == "Builder" else getattr(rtx.module, name)

    monkeypatch.setattr(engines, "load_library", lambda name: TrtLibrary(name, Module()))
    build_engine(bundle, library="tensorrt-rtx", sms=["sm89"], precision=precision)
    assert seen == [allowed]


def test_engines_differ_between_gpus_and_precisions(rtx, bundle):
    plans = set()
    for file in ("model.onnx", "model.fp16.onnx"):
        model = onnx_for_tensorrt(bundle / file)
        plans |= {compile_engine(rtx, model, sms=(sm,)).data for sm in ("sm86", "sm89")}
    assert len(plans) == 4


def test_the_profile_reaches_the_builder(rtx, bundle, monkeypatch):
    """What the engine will accept can be asked of the configuration only: reading an engine back needs a GPU."""
    from saae_export.tensorrt import compile as engines

    seen = {}
    original = engines._configure

    def spy(library, builder, network, config, sms, options):
        profile = builder.create_optimization_profile
        made = []
        proxy = type("Builder", (), {"create_optimization_profile": lambda _: made.append(profile()) or made[-1]})()
        original(library, proxy, network, config, sms, options)
        seen["shapes"] = [tuple(shape) for shape in made[0].get_shape("frame")]
        seen["level"] = config.builder_optimization_level
        seen["workspace"] = config.get_memory_pool_limit(library.module.MemoryPoolType.WORKSPACE)
        seen["target"] = config.get_compute_capability(0)
        seen["capturable"] = config.get_flag(library.module.BuilderFlag.REQUIRE_USER_ALLOCATION)

    monkeypatch.setattr(engines, "_configure", spy)
    options = EngineOptions(min_batch=2, opt_batch=4, max_batch=8, opt_level=1, workspace=256)
    compile_engine(rtx, onnx_for_tensorrt(bundle / "model.onnx"), sms=("sm86",), options=options)
    assert seen == {
        "shapes": [(count, *SIZE, 3) for count in (2, 4, 8)],
        "level": 1,
        "workspace": 256 << 20,
        "target": rtx.module.ComputeCapability.SM86,
        "capturable": True,
    }


def test_the_engine_joins_the_bundle_with_all_that_describes_it(rtx, bundle):
    before = open_bundle(bundle).manifest
    built = build_engine(bundle, library="tensorrt-rtx", sms=["sm89"], options=EngineOptions(max_batch=4, opt_level=2))
    after = open_bundle(bundle)  # every hash is compared
    version = ".".join(rtx.version.split(".")[:2])
    assert built.artefact.file == f"tensorrt_rtx-{version}-sm89-fp16-b1-1-4-o2.engine"
    assert after.file(built.artefact.file).read_bytes() == built.compiled.data
    (engine,) = after.artefacts(kind="engine")
    assert engine == built.artefact
    assert (engine.library, engine.library_version, engine.sm) == ("tensorrt_rtx", rtx.version, "sm89")
    assert (engine.profile.min, engine.profile.opt, engine.profile.max) == (1, 1, 4)
    assert engine.options["opt_level"] == 2
    assert engine.options["source_sha256"] == after.sha256("model.fp16.onnx")
    assert after.manifest.tools["tensorrt_rtx"] == rtx.version
    assert after.manifest.artefacts[:2] == before.artefacts
    assert {name: after.manifest.files[name] for name in before.files} == before.files


def test_what_was_calibrated_during_the_build_stays(rtx, bundle, monkeypatch):
    build = compile_module.compile_engine

    def meanwhile(*words, **options):
        opened = open_bundle(bundle)
        tables = {
            name: replace(pair, image=pair.image.scaled(2.0)) for name, pair in opened.manifest.thresholds.items()
        }
        update_bundle(opened, replace(opened.manifest, thresholds=tables), {})
        return build(*words, **options)

    before = open_bundle(bundle).manifest.thresholds["fp16"].image.at()
    monkeypatch.setattr(compile_module, "compile_engine", meanwhile)
    built = build_engine(bundle, library="tensorrt-rtx", sms=["sm89"])
    after = open_bundle(bundle).manifest
    assert after.thresholds["fp16"].image.at() == 2.0 * before
    assert built.artefact.file in after.files

    def replaced(*words, **options):
        opened = open_bundle(bundle)
        update_bundle(opened, opened.manifest, {"model.fp16.onnx": tiny_graph((16, 32), precision="fp16")})
        return build(*words, **options)

    monkeypatch.setattr(compile_module, "compile_engine", replaced)
    with pytest.raises(StorageError, match="changed by another command"):
        build_engine(bundle, library="tensorrt-rtx", sms=["sm86"])


def test_engines_add_up_and_the_same_one_is_replaced(rtx, bundle):
    """Of one release, GPU and precision there is one engine, whatever its batch sizes: no guess which of two to run."""
    for sms, precision in ((["sm89"], "fp16"), (["sm89"], "fp32"), (["sm86", "sm120"], "fp16")):
        build_engine(bundle, library="tensorrt_rtx", sms=sms, precision=precision)
    last = build_engine(bundle, library="tensorrt_rtx", sms=["sm89"], options=EngineOptions(1, 2, 32)).artefact
    opened = open_bundle(bundle)
    names = [artefact.file for artefact in opened.artefacts(kind="engine")]
    assert [item.profile.max for item in opened.artefacts(kind="engine", precision="fp16")] == [8, 32]
    assert last.file in names
    assert len(names) == len(set(names)) == 3
    assert "sm86+sm120" in {artefact.sm for artefact in opened.artefacts(kind="engine")}
    assert set(opened.manifest.files) == {"model.onnx", "model.fp16.onnx", *names}


def test_an_engine_without_a_gpu_is_refused_by_the_runtime_and_not_a_crash(rtx, bundle):
    if not without_gpu():
        pytest.skip("this machine has an NVIDIA driver")
    build_engine(bundle, library="tensorrt-rtx", sms=["sm89"])
    with pytest.raises((DeviceError, BackendUnavailableError)) as caught:
        backend_module.open_backend(open_bundle(bundle), "tensorrt_rtx")
    assert caught.value.cure


def test_a_bundle_with_another_releases_engine_names_both(rtx, bundle):
    opened = build_engine(bundle, library="tensorrt-rtx", sms=["sm89"]).bundle
    artefacts = tuple(
        replace(item, library_version="1.2.0.44") if item.kind == "engine" else item
        for item in opened.manifest.artefacts
    )
    changed = replace(opened, manifest=replace(opened.manifest, artefacts=artefacts))
    with pytest.raises(BackendError) as caught:
        backend_module.open_backend(changed, "tensorrt_rtx")
    assert "1.2.0.44" in str(caught.value)
    assert rtx.version in str(caught.value)
    assert "--library tensorrt-rtx --for sm89 --precision fp16" in caught.value.cure


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:-1] + bytes([data[-1] ^ 1]), None])
def test_a_damaged_engine_is_replaced_by_the_command_that_the_error_names(rtx, bundle, app, damage):
    engine = build_engine(bundle, library="tensorrt-rtx", sms=["sm86", "sm89"]).artefact
    if damage is None:
        (bundle / engine.file).unlink()
    else:
        (bundle / engine.file).write_bytes(damage((bundle / engine.file).read_bytes()))
    with pytest.raises(BundleCorruptError, match=r"engine (is missing|is truncated|was changed)") as caught:
        open_bundle(bundle)
    words = shlex.split(caught.value.cure.partition("saae-export ")[2])
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [item.sm for item in open_bundle(bundle).artefacts(kind="engine")] == ["sm86+sm89"]


def test_a_failed_build_leaves_the_bundle_as_it_was(rtx, bundle, monkeypatch):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    from saae_export.tensorrt import compile as engines

    def broken(*_, **__):
        raise BackendError("it does not build")

    monkeypatch.setattr(engines, "compile_engine", broken)
    with pytest.raises(BackendError):
        build_engine(bundle, library="tensorrt-rtx", sms=["sm89"])
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_damaged_bundle_is_not_built_from(rtx, bundle):
    data = bytearray((bundle / "model.fp16.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.fp16.onnx").write_bytes(data)
    with pytest.raises(BundleCorruptError):
        build_engine(bundle, library="tensorrt-rtx", sms=["sm89"])


# -- progress and Ctrl-C


def test_progress_is_shown_and_taken_away(rtx, bundle):
    console = Console(record=True, force_terminal=True, width=100, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    compile_engine(rtx, onnx_for_tensorrt(bundle / "model.onnx"), sms=("sm89",), console=console)
    assert "Building engine" in console.export_text()


def test_phases_nest_and_end(rtx):
    progress = BuildProgress(rtx, None)
    progress.start("outer", None, 3)
    progress.start("inner", "outer", 2)
    assert progress.step("inner", 0)
    progress.finish("inner")
    assert progress.step("outer", 2)
    assert progress.step("unknown", 1)
    progress.finish("outer")
    progress.finish("outer")
    progress.check()


def test_ctrl_c_stops_the_build(rtx, bundle, monkeypatch):
    def interrupted(self, phase, step):
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        return True

    monkeypatch.setattr(BuildProgress, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, library="tensorrt-rtx", sms=["sm89"])
    assert open_bundle(bundle).artefacts(kind="engine") == ()


# -- timing cache and gates, by a library that has them in name


def test_the_timing_cache_is_kept_beside_the_engine_and_read_again(rtx, bundle, monkeypatch):
    """TensorRT for RTX has the calls of a timing cache as no-ops: enough to see where its bytes go."""
    from saae_export.tensorrt import compile as engines

    standard = TrtLibrary("tensorrt", rtx.module)
    monkeypatch.setattr(engines, "load_library", lambda name: standard)
    with pytest.warns(DeprecationWarning, match="TensorRT-RTX"):
        first = build_engine(bundle, library="tensorrt", sms=["sm89"])
    name = first.artefact.file.replace("-fp16-b1-1-8.engine", ".timing")
    assert first.bundle.file(name).read_bytes() == first.compiled.timing_cache
    given = []
    original = engines._load_cache
    monkeypatch.setattr(
        engines, "_load_cache", lambda library, config, data: given.append(data) or original(library, config, data)
    )
    with pytest.warns(DeprecationWarning, match="TensorRT-RTX"):
        build_engine(bundle, library="tensorrt", sms=["sm89"], precision="fp32")
    assert given == [first.compiled.timing_cache]
    assert name in open_bundle(bundle).manifest.files


def test_rtx_keeps_no_timing_cache(rtx, bundle):
    assert build_engine(bundle, library="tensorrt-rtx", sms=["sm89"]).compiled.timing_cache is None


def test_gates_follow_the_library(rtx):
    standard = TrtLibrary("tensorrt", rtx.module)
    assert standard.has_version_compatible
    assert standard.hardware_levels() == ("ampere_plus", "same_compute_capability")
    assert not rtx.has_version_compatible
    assert rtx.hardware_levels() == ()
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(rtx.buildable_sms())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (EngineOptions(version_compatible=True), "--version-compatible"),
        (EngineOptions(hardware_compatible="ampere_plus"), "--for"),
    ],
)
def test_options_that_the_library_has_not(rtx, bundle, options, word):
    with pytest.raises(ConfigError) as caught:
        build_engine(bundle, library="tensorrt-rtx", sms=["sm89"], options=options)
    assert word in caught.value.cure
    assert rtx.version in caught.value.what


# -- refusals


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 5, 4)])
def test_batch_sizes_out_of_order(sizes):
    with pytest.raises(ConfigError, match="Batch sizes"):
        EngineOptions(*sizes)


@pytest.mark.parametrize("changes", [{"opt_level": 6}, {"opt_level": -1}, {"workspace": 0}])
def test_options_out_of_range(changes):
    with pytest.raises(ConfigError, match="not possible"):
        EngineOptions(**changes)


def test_a_gpu_that_the_library_does_not_build_for(rtx, bundle):
    with pytest.raises(ConfigError, match="sm87") as caught:
        build_engine(bundle, library="tensorrt-rtx", sms=["sm87"])
    assert "sm89" in caught.value.why
    with pytest.raises(ConfigError, match="not a GPU generation"):
        build_engine(bundle, library="tensorrt-rtx", sms=["ada"])


def test_without_a_gpu_the_target_has_to_be_named(rtx, bundle):
    if not without_gpu():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError) as caught:
        build_engine(bundle, library="tensorrt-rtx")
    assert "--for sm" in caught.value.cure


def test_bf16_is_the_fp32_file_and_no_graph_to_compile(rtx, bundle):
    opened = open_bundle(bundle)
    manifest = opened.manifest
    bf16 = replace(manifest.artefacts[0], precision="bf16")
    manifest = replace(
        manifest,
        artefacts=(*manifest.artefacts, bf16),
        thresholds={**manifest.thresholds, "bf16": manifest.thresholds["fp32"]},
    )
    with pytest.raises(ConfigError, match="no ONNX graph at bf16") as caught:
        build_engine(replace(opened, manifest=manifest), library="tensorrt-rtx", sms=["sm89"], precision="bf16")
    assert "fp32, fp16." in caught.value.why


def test_a_precision_that_the_bundle_has_not(rtx, bundle):
    with pytest.raises(ConfigError, match="int8") as caught:
        build_engine(bundle, library="tensorrt-rtx", sms=["sm89"], precision="int8")
    assert "fp32, fp16" in caught.value.why


@pytest.mark.parametrize(
    ("given", "precision", "options", "name"),
    [
        (("tensorrt", "10.3.0", "sm87"), "fp16", {}, "tensorrt-10.3-sm87-fp16-b1-1-8.engine"),
        (("tensorrt_rtx", "1.7.1.116", "sm86+sm89"), "fp32", {}, "tensorrt_rtx-1.7-sm86+sm89-fp32-b1-1-8.engine"),
        (
            ("tensorrt", "10.13.2.6", "sm89"),
            "int8",
            {
                "min_batch": 2,
                "opt_batch": 4,
                "opt_level": 5,
                "workspace": 512,
                "version_compatible": True,
                "hardware_compatible": "ampere_plus",
            },
            "tensorrt-10.13-sm89-int8-b2-4-8-o5-w512-vc-ampere_plus.engine",
        ),
    ],
)
def test_a_files_name_says_what_it_is(given, precision, options, name):
    assert engine_file(*given, precision, EngineOptions(**options)) == name


# -- the command


@pytest.mark.parametrize("missing", ["torch", "onnx", "timm"])
def test_a_jetson_builds_engines_without_pytorch_and_runs_doctor_without_onnx(missing):
    """Neither is at hand on a device that only runs bundles; `engine` alone needs onnx, and says so."""
    code = f"import sys; sys.modules[{missing!r}] = None; import saae_export.cli.engine"
    assert run_probe("import", code) == (True, [])


def test_onnx_missing_is_said(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailableError) as caught:
        onnx_for_tensorrt(bundle / "model.onnx")
    assert caught.value.cure == "pip install onnx"


@pytest.fixture
def app():
    import typer

    from saae_export.cli.engine import add_commands
    from saae_runtime.terminal import GuardedGroup

    made = typer.Typer(cls=GuardedGroup, pretty_exceptions_enable=False)
    add_commands(made)
    return made


def test_the_command_builds_and_prints_the_file(rtx, bundle, app):
    command = ["engine", str(bundle), "--library", "tensorrt-rtx", "--for", "sm86,sm89", "--precision", "fp32"]
    done = CliRunner().invoke(app, [*command, "--max-batch", "2", "--quiet"])
    assert done.exit_code == 0, done.output
    (engine,) = open_bundle(bundle).artefacts(kind="engine")
    assert engine.sm == "sm86+sm89"
    assert str(bundle / engine.file) in done.output.replace("\n", "")


def test_the_command_ends_with_a_panel_on_errors(rtx, bundle, app):
    done = CliRunner().invoke(app, ["engine", str(bundle), "--library", "tensorrt-rtx", "--for", "sm87"])
    assert done.exit_code == 2
    assert "ConfigError" in done.output
    assert "Traceback" not in done.output


def test_the_threshold_is_an_input_and_not_built_in(rtx, bundle):
    model = onnx.load(bundle / "model.onnx")
    assert "threshold" in {item.name for item in model.graph.initializer}
    stripped = onnx_for_tensorrt(bundle / "model.onnx")
    kept = {item.name for item in onnx.load_from_string(stripped).graph.initializer}
    assert kept == {item.name for item in model.graph.initializer} - {"threshold"}
    names = []
    for data in (model.SerializeToString(), stripped):
        network, _parser = parse_network(rtx, rtx.module.Builder(rtx.logger), data, "model.onnx")
        names.append({network.get_input(index).name for index in range(network.num_inputs)})
    assert names == [{"frame"}, {"frame", "threshold"}]
