"""What `saae-export triton` writes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from folders import leftovers
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle
from typer.testing import CliRunner

from saae_export.cli.command import app
from saae_export.triton.config import ServerOptions
from saae_export.triton.repository import export_triton
from saae_runtime import Engine
from saae_runtime.bundle import open_bundle, update_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.manifest import Artefact, Manifest, Profile
from saae_runtime.triton.known import known_frame

SIZE = (16, 24)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "bundle", SIZE, precisions=("fp32", "fp16"))


def about(folder: Path) -> dict:
    """The parameter `saae` of a model's configuration."""
    messages = need("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
    found: dict = json.loads(config.parameters["saae"].string_value)
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_repository_a_kind(bundle: Path, tmp_path: Path) -> None:
    written, left = export_triton(bundle, tmp_path / "repo")
    assert [item.kind for item in written] == ["onnx", "python"]
    assert [item.kind for item in left] == ["tensorrt"]
    assert "saae-export engine" in left[0].cure
    assert files(tmp_path / "repo") == {
        "onnx/tiny/config.pbtxt",
        "onnx/tiny/1/model.onnx",
        "python/tiny/config.pbtxt",
        "python/tiny/1/model.py",
        "python/tiny/1/bundle/manifest.json",
        "python/tiny/1/bundle/model.onnx",
    }
    assert f"--model-repository={tmp_path}/repo/onnx" in written[0].serve
    assert leftovers(tmp_path / "repo") == []


def test_a_client_can_judge_by_what_the_configuration_says(bundle: Path, tmp_path: Path) -> None:
    export_triton(bundle, tmp_path, kinds=["onnx"], precision="fp16")
    found = about(tmp_path / "onnx" / "tiny")
    manifest = Manifest.from_json(found["manifest"])
    whole = open_bundle(bundle).manifest
    assert set(manifest.thresholds) == {"fp16"}
    assert manifest.thresholds["fp16"] == whole.thresholds["fp16"]
    assert manifest.frame == whole.frame
    assert [item.precision for item in manifest.artefacts] == ["fp16"]
    with Engine(bundle, backend="onnxruntime:cpu", precision="fp16") as engine:
        assert found["check"]["score"] == engine(known_frame(SIZE)).score
    assert found["check"]["tolerance"] == pytest.approx(0.1)


def test_the_python_model_holds_a_bundle_that_scores_alike(bundle: Path, tmp_path: Path) -> None:
    export_triton(bundle, tmp_path, kinds=["python"], precision="fp16", backend="onnxruntime:cpu")
    inside = tmp_path / "python" / "tiny" / "1" / "bundle"
    assert files(inside) == {"manifest.json", "model.fp16.onnx"}
    frame = gray_frame(SIZE, spot=(2, 3, 4, 5))
    options = about(tmp_path / "python" / "tiny")["options"]
    assert options["name"] == "onnxruntime:cpu"
    with (
        Engine(bundle, backend="onnxruntime:cpu", precision="fp16") as whole,
        Engine(inside, backend=options["name"], precision=options["precision"]) as copy,
    ):
        np.testing.assert_array_equal(copy(frame).anomaly_map, whole(frame).anomaly_map)


def test_a_known_frame_of_any_size_has_all_values() -> None:
    assert len(np.unique(known_frame((64, 80)))) == 256
    assert known_frame((3, 5)).shape == (3, 5, 3)
    assert known_frame((64, 80)).tobytes() == known_frame((64, 80)).tobytes()


def test_numpy_2_in_the_server_is_refused_in_words(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    """The module that Triton gives its models is not here: only its exception is needed to see the refusal."""
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("needs numpy 2, which is what is refused")
    export_triton(bundle, tmp_path, kinds=["python"])
    utils = ModuleType("triton_python_backend_utils")
    utils.TritonModelException = type("TritonModelException", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    spec = importlib.util.spec_from_file_location("served", tmp_path / "python" / "tiny" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(utils.TritonModelException, match="numpy<2"):
        module.TritonPythonModel().initialize({"model_config": "{}"})


# --- what was there before ---


def test_a_model_is_replaced_by_the_next_export(bundle: Path, tmp_path: Path) -> None:
    for batch in (8, 3):
        export_triton(bundle, tmp_path, kinds=["onnx"], options=ServerOptions(max_batch=batch))
    assert "max_batch_size: 3\n" in (tmp_path / "onnx" / "tiny" / "config.pbtxt").read_text()
    assert leftovers(tmp_path / "onnx") == []


def test_something_else_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "python" / "tiny"
    foreign.mkdir(parents=True)
    (foreign / "config.pbtxt").write_text('name: "tiny"\n')
    with pytest.raises(ConfigError, match="something else"):
        export_triton(bundle, tmp_path)
    assert files(tmp_path) & {"onnx/tiny/config.pbtxt"} == set()  # nothing was begun
    assert (foreign / "config.pbtxt").read_text() == 'name: "tiny"\n'


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "ä"])
def test_names_that_are_no_folder_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a name for a model"):
        export_triton(bundle, tmp_path / "repo", name=name)
    assert not (tmp_path / "repo").exists()


def test_a_category_of_any_letters_becomes_a_name(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    renamed = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, category="gear / größe 3"))
    (written,), _ = export_triton(renamed, tmp_path / "repo", kinds=["onnx"])
    assert written.folder.name == "gear___gr__e_3"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ["onnx", "torch"]}, "torch"),
        ({"kinds": []}, "No kind"),
        ({"precision": "int8"}, "no ONNX graph at int8"),
        ({"precision": "bf16"}, "no ONNX graph at bf16"),
    ],
)
def test_what_cannot_be_written(bundle: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        export_triton(bundle, tmp_path / "repo", **options)
    assert not (tmp_path / "repo").exists()


# --- plans ---


def with_engine(bundle: Path, precision: str = "fp32") -> None:
    """Puts an entry for an engine of another machine into a bundle; its bytes are never read here."""
    opened = open_bundle(bundle)
    engine = Artefact("x.engine", "engine", precision, "tensorrt", "10.3", "sm87", Profile(1, 2, 8), {"opt_level": 4})
    manifest = dataclasses.replace(opened.manifest, artefacts=(*opened.manifest.artefacts, engine))
    update_bundle(opened, manifest, {"x.engine": b"engine"})


def test_where_no_plan_can_be_compiled_the_server_is_told_how(bundle: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    with_engine(bundle)
    _, (left,) = export_triton(bundle, tmp_path / "repo", options=ServerOptions(max_batch=4))
    assert left.kind == "tensorrt"
    assert left.cure.startswith("in the server's container: trtexec --stronglyTyped --noTF32 --onnx=")
    assert f"--onnx={tmp_path}/repo/onnx/tiny/1/model.onnx" in left.cure
    assert "--maxShapes=frame:4x16x24x3" in left.cure
    assert not (tmp_path / "repo" / "tensorrt").exists()


def test_the_servers_trtexec_is_not_told_of_a_graph_that_is_not_written(bundle: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    with_engine(bundle)
    _, (left,) = export_triton(bundle, tmp_path / "repo", kinds=["tensorrt"])
    assert left.cure.startswith(
        "write its graph, too, with --kind onnx,tensorrt; then in the server's container: trtexec"
    )


def test_only_fp32_is_compiled_without_tf32_by_the_server(bundle: Path, tmp_path: Path) -> None:
    """What `compile_plan` does here, too."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    with_engine(bundle, "fp16")
    _, (left,) = export_triton(bundle, tmp_path / "repo", precision="fp16")
    assert "trtexec --stronglyTyped --onnx=" in left.cure


# --- devices ---


def test_on_the_cpu_no_model_takes_a_gpu(bundle: Path, tmp_path: Path) -> None:
    with_engine(bundle)
    written, (left,) = export_triton(bundle, tmp_path, options=ServerOptions(device="cpu"))
    assert [item.kind for item in written] == ["onnx", "python"]
    assert (left.kind, "needs a GPU" in left.why) == ("tensorrt", True)
    assert about(tmp_path / "python" / "tiny")["options"]["name"] == "onnxruntime:cpu"
    assert "kind: KIND_CPU" in (tmp_path / "python" / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("precision", "backend", "expected"),
    [
        ("fp32", "auto", "onnxruntime:cpu"),
        ("fp32", "onnxruntime", "onnxruntime:cpu"),
        ("fp32", "openvino", "openvino"),
        ("bf16", "auto", "openvino"),
        ("int8-bf16", "auto", "openvino"),
    ],
)
def test_which_backend_computes_on_the_cpu(
    bundle: Path, tmp_path: Path, precision: str, backend: str, expected: str
) -> None:
    opened = open_bundle(bundle)
    (graph,) = opened.artefacts(kind="onnx", precision="fp32")
    manifest = dataclasses.replace(
        opened.manifest,
        artefacts=(dataclasses.replace(graph, precision=precision),),
        thresholds={precision: opened.manifest.thresholds["fp32"]},
    )
    update_bundle(opened, manifest, {}, drop=("model.fp16.onnx",))
    options = ServerOptions(device="cpu")
    export_triton(bundle, tmp_path / "repo", kinds=["python"], options=options, backend=backend)
    assert about(tmp_path / "repo" / "python" / "tiny")["options"]["name"] == expected


def test_a_backend_of_gpus_is_refused_on_the_cpu(bundle: Path, tmp_path: Path) -> None:
    options = ServerOptions(device="cpu")
    with pytest.raises(ConfigError, match="does not fit --device cpu"):
        export_triton(bundle, tmp_path / "repo", options=options, backend="onnxruntime:cuda")
    assert not (tmp_path / "repo").exists()
    export_triton(bundle, tmp_path / "repo", kinds=["onnx"], options=options, backend="onnxruntime:cuda")  # not used


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_served_graph_compiles_with_the_frame_as_its_only_input(bundle: Path, precision: str) -> None:
    """By TensorRT for RTX, which needs no GPU; the parser is that of TensorRT."""
    need("tensorrt_rtx")
    from saae_export.tensorrt.compile import EngineOptions, compile_engine
    from saae_export.triton.graph import serving_graph
    from saae_runtime.backends.tensorrt.library import load_library

    (artefact,) = open_bundle(bundle).artefacts(precision=precision)
    found = compile_engine(
        load_library("tensorrt_rtx"), serving_graph(bundle / artefact.file), sms=["sm89"], options=EngineOptions()
    )
    assert [(item.name, item.shape) for item in found.network.inputs] == [("frame", (-1, 16, 24, 3))]
    assert {item.name: item.shape for item in found.network.outputs} == {"anomaly_map": (-1, 16, 24), "score": (-1,)}
    assert len(found.data) > 1000


# --- the command ---


def test_the_command_prints_folders_and_how_to_serve_them(bundle: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    words = ["triton", str(bundle), "--repository", str(repo), "--name", "gear", "--kind", "onnx"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(repo / "onnx" / "gear")]
    assert "tritonserver --model-repository=" in done.stderr


def test_the_command_fails_where_nothing_could_be_written(bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["triton", str(bundle), "--repository", str(tmp_path / "r"), "--kind", "tensorrt"])
    assert done.exit_code == 2
    assert "Nothing was written" in done.output
