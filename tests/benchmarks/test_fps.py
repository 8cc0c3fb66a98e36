"""benchmarks/fps.py on a tiny model: what it writes, its ratios, what it compares, its errors; no time."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY, noise_frames, tiny_detector
from typer import Typer
from typer.testing import CliRunner

from benchmarks import common, fps, fps_table, fps_variants, random_model
from benchmarks.torch_variants import Deployed, TorchBackend, gflop, score_frames, torch_backend
from saae_export.parity.pytorch import TorchReference
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendUnavailableError, ConfigError
from saae_train.fitting import precision as precision_module
from saae_train.model.checkpoint import Checkpoint

pytestmark = pytest.mark.needs("onnxscript")

BACKENDS = ("pytorch", "pytorch:fused", "onnxruntime:cpu")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    config = random_model.random_config(TINY, "fast", (0, 1), (32, 48), latent=12, components=24)
    return random_model.random_checkpoint(config)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("random")
    return random_model.random_bundle(checkpoint, folder / "bundle", None, ("fp32",))


@pytest.fixture(scope="module")
def settings() -> Iterator[fps_variants.Settings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saae_train.experiments.timing.PAUSE", 0.0)
        yield fps_variants.Settings((40, 56), (1, 2), BACKENDS, ("fp32", "bf16"), seconds=0.02, threads=1)


@pytest.fixture(scope="module")
def data(bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings) -> dict[str, Any]:
    return fps.run(bundle, checkpoint.detector, settings, "random")


def test_everything_is_timed_within_full_products(
    bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's convolutions are TF32 on a GPU unless told otherwise, and the rows say FP32."""
    asked: list[str] = []
    inside: list[list[str]] = []

    @contextmanager
    def products(kind: str, device: torch.device) -> Iterator[None]:
        asked.append(kind)
        yield
        asked.pop()

    timed = fps._timed
    monkeypatch.setattr(precision_module, "matmul_precision", products)
    monkeypatch.setattr(fps, "_timed", lambda *given: inside.append(list(asked)) or timed(*given))
    chosen = dataclasses.replace(settings, batches=(1,), backends=("pytorch",), precisions=("fp32",))
    fps.run(bundle, checkpoint.detector, chosen, "random")
    assert inside == [["fp32"]]
    assert asked == []


def test_kinds_can_be_chosen_and_every_batch_size_is_kept(
    bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings
) -> None:
    kept: list[dict[str, Any]] = []
    chosen = dataclasses.replace(
        settings, backends=("pytorch", "onnxruntime:cpu"), precisions=("fp32",), kinds=("compute", "stream")
    )
    data = fps.run(bundle, checkpoint.detector, chosen, "random", keep=lambda part: kept.append(copy.deepcopy(part)))
    assert {(row["backend"], row["kind"]) for row in data["rows"]} == {
        ("pytorch", "compute"),
        ("onnxruntime:cpu", "compute"),
        ("onnxruntime:cpu", "stream"),
    }
    assert [{row["batch"] for row in part["rows"]} for part in kept] == [{1}, {1, 2}]
    assert kept[0]["rows"] == [row for row in data["rows"] if row["batch"] == 1]
    assert set(data) - set(kept[0]) == {"peak_memory_gib"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kinds frames"):
        fps._kinds("frames")
    assert fps._kinds("compute,stream graph") == ("compute", "stream graph")
    assert fps._kinds(None) is None


def test_int8_and_the_whole_model(checkpoint: Checkpoint, settings: fps_variants.Settings, tmp_path: Path) -> None:
    bundle = random_model.random_bundle(checkpoint, tmp_path / "bundle", None, ("fp32", "int8"))
    assert {item.precision for item in bundle.manifest.artefacts} == {"fp32", "int8"}
    chosen = dataclasses.replace(
        settings, batches=(1,), backends=("onnxruntime:cpu",), precisions=("fp32", "int8"), whole=True
    )
    data = fps.run(bundle, checkpoint.detector, chosen, "random", True)
    rows = {(row["backend"], row["precision"]): row for row in data["rows"] if row["kind"] == "compute"}
    assert {("onnxruntime:cpu", "int8"), ("pytorch:whole", "fp32")} <= set(rows)
    assert rows["pytorch:whole", "fp32"]["ratio_whole"] == 1.0
    assert all("ratio_whole" in row for row in rows.values())
    errors = {(item["backend"], item["precision"]): item["map_error"] for item in data["variants"]}
    assert errors["pytorch:whole", "fp32"] is None  # another model
    assert 0 < errors["onnxruntime:cpu", "int8"] < 0.1


def test_result_says_what_was_timed(data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = common.write_result(data, tmp_path / "fps.json")
    data = json.loads(path.read_text())
    assert data["benchmark"] == "fps"
    assert data["settings"]["threads"] == 1
    assert data["settings"]["frame_size"] == [40, 56]
    assert data["settings"]["graph_size"] == [32, 48]
    assert data["model"]["weights"] == "random"
    assert data["model"]["gflop_per_frame"] >= 0
    assert data["peak_memory_gib"] > 0
    found = {(row["backend"], row["precision"], row["kind"], row["batch"]) for row in data["rows"]}
    torch_rows = [("pytorch", "fp32"), ("pytorch", "bf16"), ("pytorch:fused", "fp32")]
    expected = {(*name, kind, n) for name in torch_rows for kind in ("compute", "frame") for n in (1, 2)}
    expected |= {("onnxruntime:cpu", "fp32", kind, n) for kind in fps_table.KINDS[:5] for n in (1, 2)}
    assert found == expected
    assert len(found) == len(data["rows"])
    for row in data["rows"]:
        timing = row["timing"]
        assert timing["runs"] >= 1
        assert 0 < timing["min_ms"] <= timing["median_ms"] <= timing["p95_ms"] <= timing["p99_ms"]
        assert set(data["inside"]) >= {row["kind"]}
    fps_table.show(data, path)
    out = capsys.readouterr().out
    for word in ("onnxruntime:cpu fp32", "compute, batch 1", "stream graph, batch 2", "Weights: random"):
        assert word in out


def test_ratios_are_those_of_the_same_run(data: dict[str, Any]) -> None:
    rows = {(row["backend"], row["precision"], row["kind"], row["batch"]): row for row in data["rows"]}
    base = {"stream": "frame", "stream graph": "compute", "trigger": "frame"}
    for (name, precision, kind, batch), row in rows.items():
        against = rows["pytorch", "fp32", base.get(kind, kind), batch]
        expected = against["timing"]["median_ms"] / row["timing"]["median_ms"]
        assert row["fps"] == pytest.approx(1000 * batch / row["timing"]["median_ms"], rel=0.01)
        assert row["ratio"] == pytest.approx(expected, rel=0.02, abs=0.001)
        if kind in base:
            own = rows[name, precision, base[kind], batch]
            assert row["share"] == pytest.approx(
                own["timing"]["mean_ms"] / row["timing"]["mean_ms"], rel=0.02, abs=0.001
            )
        else:
            assert "share" not in row
    assert "ratio_dfr" not in data["rows"][0]
    assert data["saae_to_dfr"] == []


def test_ratio_to_dfr_and_the_papers() -> None:
    def row(backend: str, kind: str, median: float) -> dict[str, Any]:
        timing = {"median_ms": median, "mean_ms": median}
        return {
            "backend": backend,
            "precision": "fp32",
            "kind": kind,
            "batch": 1,
            "fps": 1000 / median,
            "timing": timing,
        }

    rows = [row("pytorch", "compute", 10.0), row("onnxruntime:cpu", "compute", 5.0), row("dfr", "compute", 30.0)]
    fps_table.add_ratios(rows)
    assert [r["ratio"] for r in rows] == [1.0, 2.0, pytest.approx(1 / 3, abs=1e-3)]
    assert [r["ratio_dfr"] for r in rows] == [3.0, 6.0, 1.0]
    paper, here = fps_table.saae_to_dfr(rows, "vit_x")
    assert paper["ratio"] == pytest.approx(paper["saae_fps"] / paper["dfr_fps"], abs=0.005)
    assert here == {"where": "here, vit_x, compute, batch 1", "ratio": 3.0}
    rows.append(row("pytorch:whole", "compute", 15.0))
    fps_table.add_ratios(rows)
    assert fps_table.saae_to_dfr(rows, "vit_x")[1]["ratio"] == 2.0  # the paper's model has no components


def test_every_variant_computes_the_same(data: dict[str, Any]) -> None:
    errors = {(v["backend"], v["precision"]): v["map_error"] for v in data["variants"]}
    assert errors.pop(("pytorch", "fp32")) is None
    assert errors["pytorch:fused", "fp32"] < 1e-4
    assert errors["onnxruntime:cpu", "fp32"] < 1e-4
    assert 0 < errors["pytorch", "bf16"] < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.8])
def test_the_reference_is_the_one_of_parity(smoothing: float) -> None:
    detector = tiny_detector(size=(32, 48), layers=(1,), latent=12, smoothing=smoothing)
    frames = noise_frames(2, (40, 56))
    backend = TorchBackend("pytorch", "fp32", Deployed(detector, (40, 56)), (40, 56))
    outputs = backend.infer(frames, 0.5)
    reference = TorchReference(detector, (40, 56))
    for frame, anomaly_map, score in zip(frames, outputs.anomaly_map, outputs.score, strict=True):
        right = reference(frame)
        expected_map, expected_score = right.anomaly_map, right.score
        np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-4, atol=1e-5)
        assert score == pytest.approx(expected_score, rel=1e-4)
    np.testing.assert_array_equal(outputs.mask, outputs.anomaly_map > np.float32(0.5))


def test_frame_to_result_takes_the_engines_steps(bundle: Bundle, checkpoint: Checkpoint) -> None:
    frames = list(noise_frames(2, (40, 56)))
    backend = torch_backend("pytorch:fused", "fp32", checkpoint.detector, (32, 48), "cpu")
    with Engine(bundle, backend="onnxruntime:cpu", threads=1) as engine:
        limit = engine(frames[0]).score * 0.9
        expected = engine(frames, threshold=limit, image_threshold=limit)
        found = score_frames(backend, frames, limit, limit)
    for a, b in zip(found, expected, strict=True):
        assert a.size == b.size == (40, 56)
        assert a.is_anomalous == b.is_anomalous
        np.testing.assert_allclose(a.anomaly_map, b.anomaly_map, rtol=1e-3, atol=1e-5)
        assert (a.mask != b.mask).mean() < 0.01
        assert b.mask.any()


def test_work_is_counted_for_every_matrix_product() -> None:
    detector = tiny_detector(size=(32, 48), layers=(0,), latent=12, standardise=False)
    positions, width, latent, patch = 6, 192, 12, 16 * 16 * 3
    middle = (width + 2 * latent) // 2
    coder = width * middle + middle * 2 * latent + 2 * latent * latent
    attention = 4 * latent * latent + 2 * positions * latent
    saae = 2 * coder + 2 * latent * latent + 3 * attention + 2 * (2 * latent * 2 * latent)
    expected = 2 * positions * (patch * width + saae) / 1e9
    assert gflop(Deployed(detector, (32, 48))) == pytest.approx(expected, rel=0.02)


def test_random_weights_in_the_shapes_of_a_bundle(bundle: Bundle, checkpoint: Checkpoint) -> None:
    found = random_model.like(bundle.manifest).detector
    shapes = {name: tuple(value.shape) for name, value in found.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in checkpoint.detector.state_dict().items()}
    assert bundle.manifest.category == "random-weights"
    assert "random" in bundle.manifest.backbone.weights_source


def test_the_papers_configuration() -> None:
    config = random_model.random_config("vit_base_patch16_384")
    assert (config.layers, config.latent, config.input_size) == ((0, 1, 2, 3, 4), 300, (384, 384))
    assert (config.components, config.score, config.mlp_ratio) == (None, "l2", 2)
    subspace = random_model.random_config("vit_base_patch16_384", components=512)
    assert subspace.components == 512
    assert random_model.random_config("vit_small_patch14_dinov2", components=0).components is None
    with pytest.raises(ConfigError, match="layers"):
        random_model.random_config(TINY)


def test_unknown_names_are_refused_with_near_ones(settings: fps_variants.Settings) -> None:
    with pytest.raises(ConfigError, match="onnxruntime:cup") as caught:
        fps_variants.check_names(dataclasses.replace(settings, backends=("onnxruntime:cup",)))
    assert "onnxruntime:cpu" in caught.value.cure
    with pytest.raises(ConfigError, match="fp64"):
        fps_variants.check_names(dataclasses.replace(settings, precisions=("fp64",)))


def test_a_named_backend_that_is_not_here_is_an_error(
    bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings
) -> None:
    # The bundle has no engine, so this holds on a machine with a GPU too.
    with pytest.raises(BackendUnavailableError, match="tensorrt"):
        fps_variants.open_variants(bundle, checkpoint.detector, dataclasses.replace(settings, backends=("tensorrt",)))
    asked = dataclasses.replace(settings, backends=("onnxruntime:cpu",), precisions=("int8",))
    with pytest.raises(BackendUnavailableError, match="int8"):
        fps_variants.open_variants(bundle, checkpoint.detector, asked)


def test_what_is_not_here_is_said(bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings) -> None:
    everything = dataclasses.replace(settings, backends=None, precisions=("fp32",))
    variants, absent = fps_variants.open_variants(bundle, checkpoint.detector, everything)
    try:
        assert variants[0].key == "pytorch fp32"
        assert "onnxruntime:cpu fp32" in [variant.key for variant in variants]
    finally:
        for variant in variants:
            variant.close()
    reasons = {item["backend"]: item["why"] for item in absent}
    assert {"tensorrt", "onnxruntime:cuda", "onnxruntime:tensorrt"} <= set(reasons)
    assert all(reasons.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--random", "--backends", "onnxruntim:cpu", "--device", "cpu"], "onnxruntime:cpu"),
        (["--random", "--precisions", "int9", "--device", "cpu"], "int8"),
        (["--random", "--batch", "1,x", "--device", "cpu"], "--batch"),
        (["--random", "--frame-size", "big", "--device", "cpu"], "big"),
        ([], "--random"),
        (["--random", "--seconds", "0"], "--seconds"),
    ],
)
def test_bad_options_end_with_what_to_type(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "use_threads", lambda count: None)  # it would hold this whole process to fewer cores
    app = Typer()
    app.command()(fps.main)
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert expected in done.output
    assert not (tmp_path / "x.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_variants_on_a_gpu_compute_the_same(
    bundle: Bundle, checkpoint: Checkpoint, settings: fps_variants.Settings
) -> None:
    on_gpu = dataclasses.replace(
        settings, device="cuda", backends=("pytorch", "pytorch:cudagraph"), precisions=("fp32", "fp16")
    )
    found = fps.run(bundle, checkpoint.detector, on_gpu, "random")
    assert {row["kind"] for row in found["rows"]} == {"compute", "frame", "device"}
    errors = {(v["backend"], v["precision"]): v["map_error"] for v in found["variants"]}
    assert errors["pytorch:cudagraph", "fp32"] < 1e-4
    assert errors["pytorch:cudagraph", "fp16"] < 0.05
    assert found["matmul_fp16_tflops"] > 0
