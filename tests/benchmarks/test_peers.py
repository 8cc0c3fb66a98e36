"""benchmarks/peers.py without anomalib: ours measured, a graph in a peer's form evaluated, and what it says without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from here_workers import Here
from needs import need
from tiny_sets import TINY_CHANGES, write_square_set
from typer import Typer
from typer.testing import CliRunner

from benchmarks import anomalib_peers, peers, report
from saae_runtime.errors import BackendUnavailableError
from saae_train.data.category import find_category

pytestmark = pytest.mark.needs("timm", "onnx", "onnxruntime")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_square_set(tmp_path_factory.mktemp("data"))


def typed(*words: object) -> tuple[int, str]:
    app = Typer()
    app.command()(peers.main)
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return done.exit_code, " ".join(done.output.split())


def without_anomalib(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_without_anomalib_it_says_what_to_install_before_any_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", without_anomalib)
    with pytest.raises(BackendUnavailableError, match="not installed") as found:
        anomalib_peers.anomalib_version()
    assert "pip install 'anomalib[cpu]==" in found.value.cure
    words = ("--data", tree, "--categories", "part", "--out", tmp_path / "r.json", "--work", tmp_path / "work")
    code, text = typed(*words)
    assert code == found.value.exit_code
    assert "anomalib is not installed here." in text
    assert not (tmp_path / "r.json").exists()
    assert not (tmp_path / "work").exists()


def test_what_is_not_run_says_why(tree: Path) -> None:
    for name in anomalib_peers.NOT_RUN:
        code, text = typed("--data", tree, "--categories", "part", "--methods", name)
        assert code == 2
        assert f"{name} is not run." in text
    code, text = typed("--data", tree, "--categories", "part", "--methods", "GANomaly")
    assert code == 2
    assert "There is no method" in text


def exported_here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """`python -m saae_export.cli ...` in this process, which has its libraries already."""
    from saae_export.cli.command import app as export_app

    assert command[:3] == [sys.executable, "-m", "saae_export.cli"]
    done = CliRunner().invoke(export_app, command[3:])
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


@pytest.mark.slow
def test_ours_is_fitted_exported_evaluated_and_timed_and_not_twice(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are those of tests/train/experiments/test_jobs.py; what they do is done here."""
    need("onnxscript")
    monkeypatch.setattr(peers, "Processes", lambda threads: Here())
    monkeypatch.setattr(peers, "subprocess", SimpleNamespace(run=exported_here))
    out = tmp_path / "peers.json"
    words = ["--data", tree, "--categories", "part", "--methods", "ours", "--weights", "random", "--seconds", 0.2]
    for key, value in TINY_CHANGES.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    words += ["--work", tmp_path / "work", "--out", out]
    code, text = typed(*words)
    assert code == 0, text
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["category"], row["method"], row["fit_images"], row["test_images"]) == ("part", "ours", 10, 6)
    assert 0 <= row["metrics"]["pixel_roc_auc"] <= 1
    assert row["timing"]["median_ms"] > 0
    model = tmp_path / "work/part/ours/bundle/model.onnx"
    assert row["graph_mb"] == round(model.stat().st_size / 1e6, 1)
    made = model.stat().st_mtime_ns
    code, text = typed(*words)
    assert code == 0, text
    assert model.stat().st_mtime_ns == made
    refuse: list[str] = []
    monkeypatch.setattr(peers, "_fresh", lambda name, *_: refuse.append(name) or {})
    typed(*words, "--preset", "lite")
    assert refuse == ["part ours"]
    (line,) = peers.table_rows([row])
    assert line[0] == "part"
    assert "| part | ours (preset fast" in report.render(json.loads(out.read_text()))


def brightness_graph(path: Path, size: int) -> None:
    """A graph in the form of anomalib's: the map is the mean of the colours, the score its largest value."""
    from onnx import TensorProto, helper, save

    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size])
    score = helper.make_tensor_value_info("pred_score", TensorProto.FLOAT, [1])
    shown = helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [1, 1, size, size])
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["anomaly_map"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["input"], ["largest"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Identity", ["largest"], ["pred_score"]),
    ]
    graph = helper.make_graph(nodes, "peer", [image], [score, shown])
    path.parent.mkdir(parents=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def test_a_peers_graph_gives_maps_at_the_frames_size_to_our_evaluator(tree: Path, tmp_path: Path) -> None:
    brightness_graph(tmp_path / "weights/onnx/model.onnx", 56)
    scorer = peers.open_scorer("PaDiM", tmp_path, 1)
    frame = np.zeros((70, 64, 3), np.uint8)
    frame[:, 32:] = 255
    found = scorer(frame)
    assert found.anomaly_map.shape == (70, 64)
    assert found.score == pytest.approx(1.0)
    assert found.anomaly_map[:, :28].max() == pytest.approx(0.0, abs=1e-6)
    assert found.anomaly_map[:, 36:].min() == pytest.approx(1.0)
    metrics = peers.evaluated(scorer, find_category(tree, "part"), lambda *now: None).overall.to_json()["metrics"]
    assert metrics["image_roc_auc"]["value"] == 1.0
    assert metrics["pixel_roc_auc"]["value"] > 0.98


def test_local_weights_stand_for_the_pretrained_ones_and_for_no_others() -> None:
    import timm
    import torch

    name = "vit_tiny_patch16_224"
    state = timm.create_model(name).state_dict()
    with anomalib_peers.local_weights(name, state):
        model = timm.create_model(name, pretrained=True, dynamic_img_size=True)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not torch.equal(timm.create_model(name).head.weight, state["head.weight"])
        with pytest.raises(LookupError, match="resnet18"):
            timm.create_model("resnet18", pretrained=True)


def test_an_environment_is_all_that_is_needed_once() -> None:
    alone, with_more = peers.environment_mb("numpy"), peers.environment_mb("onnxruntime", "numpy")
    assert alone is not None
    assert with_more is not None
    assert 10 < alone < with_more
    assert peers.environment_mb("numpy", "numpy") == alone
    assert peers.environment_mb("no-such-distribution") is None
