"""Weights stored in FP16: a smaller file, a graph that computes as before, and a parity gate that knows of it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from rich.console import Console
from tiny_builds import CONFIG, draw, options, quiet_build
from tiny_models import noise_frames, tiny_detector

from saae_export.cli.inspect import bundle_view
from saae_export.graph.fused import FusedGraph
from saae_export.graph.half_weights import halve_weights, store_half
from saae_export.graph.onnx_file import export_onnx, run_onnx, session
from saae_export.parity.compare import BOUNDS, HALF_WEIGHTS, MEMORY_BF16, MEMORY_FP16, MEMORY_FP32, bounds_of
from saae_export.parity.verify import verify
from saae_export.pipeline.options import check_options
from saae_runtime import open_bundle
from saae_runtime.errors import ConfigError

SIZE = (80, 100)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same graph as exported, and with its weights halved."""
    folder = tmp_path_factory.mktemp("half")
    full, half = folder / "full.onnx", folder / "half.onnx"
    export_onnx(FusedGraph(tiny_detector(components=48, smoothing=0.5, score="cosine"), SIZE, "fp32"), full, 0.5)
    half.write_bytes(full.read_bytes())
    store_half(half, SIZE)
    return full, half


def test_the_file_is_smaller_and_only_weights_of_blocks_changed(files: tuple[Path, Path]) -> None:
    full, half = (onnx.load(path) for path in files)
    assert files[1].stat().st_size < 0.7 * files[0].stat().st_size
    stored = {item.name: item for item in half.graph.initializer}
    large = 0
    for item in full.graph.initializer:
        weight = numpy_helper.to_array(item)
        if item.name in stored:
            assert stored[item.name] == item
            assert not (item.name.startswith("block_") and weight.size >= 1024)
        else:
            halved = numpy_helper.to_array(stored[f"{item.name}.half"])
            assert halved.dtype == np.float16
            np.testing.assert_array_equal(halved, weight.astype(np.float16))
            large += weight.size
    assert large > 300_000


def test_the_maps_differ_by_the_rounding_alone(files: tuple[Path, Path]) -> None:
    frames = noise_frames(2, SIZE)
    full, half = (run_onnx(session(path), frames) for path in files)
    for name in ("anomaly_map", "score"):
        error = np.abs(half[name] - full[name]).max() / np.abs(full[name]).max()
        assert 0 < error < 2e-3


def test_onnx_runtime_folds_the_casts(files: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(files[1]), settings, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "optimised.onnx")
    constants = {item.name for item in loaded.graph.initializer}
    assert not [node.name for node in loaded.graph.node if node.op_type == "Cast" and node.input[0] in constants]
    assert TensorProto.FLOAT16 not in {item.data_type for item in loaded.graph.initializer}


def test_what_fp16_cannot_hold_stays(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[0])
    large = [item for item in model.graph.initializer if item.name.startswith("block_")]
    chosen = sorted(large, key=lambda item: -np.prod(item.dims))[:2]
    for item, factor in zip(chosen, (1e9, 1e-9), strict=True):
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * np.float32(factor), item.name))
    names = {item.name for item in chosen}
    assert halve_weights(model) > 0
    kept = {item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT}
    assert names <= kept


def test_twice_is_an_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(files[1].read_bytes())
    with pytest.raises(ConfigError, match="half-weights"):
        store_half(copy, SIZE)
    assert copy.read_bytes() == files[1].read_bytes()


def test_a_build_says_so_and_passes_its_own_gate(tmp_path: Path) -> None:
    data = draw(tmp_path / "data")
    result, _ = quiet_build(options(data, tmp_path, precisions=("fp32",), half_weights=True, samples=2))
    bundle = open_bundle(tmp_path / "bundle")
    artefact = bundle.artefacts(precision="fp32")[0]
    assert artefact.options == {"weights": "fp16"}
    assert artefact.parity is not None
    assert artefact.parity.passed
    assert artefact.parity.bound_map == MEMORY_FP16.map
    assert artefact.parity.map_rel_error > 0
    manifest = result.bundle.manifest
    assert bounds_of(manifest, "fp32") == MEMORY_FP16
    whole = dataclasses.replace(manifest, artefacts=(dataclasses.replace(artefact, options={}),))
    assert bounds_of(whole, "fp32") == MEMORY_FP32
    assert bounds_of(manifest, "fp16") == MEMORY_FP16
    assert bounds_of(manifest, "bf16") == MEMORY_BF16
    plain = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, score="joint"))
    assert bounds_of(plain, "fp16") == BOUNDS["fp16"]
    assert bounds_of(plain, "fp32") == HALF_WEIGHTS
    reports = verify(bundle.path, backend="onnxruntime:cpu").reports
    assert [report.bounds for report in reports] == [MEMORY_FP16]
    console = Console(width=200, file=io.StringIO())
    console.print(bundle_view(bundle))
    assert "FP16 weights" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("backbone", "layers"), [("vgg19", None), ("vgg19", (1, 2)), (CONFIG.backbone, (0,))])
def test_a_backbone_without_blocks_is_refused_before_the_fit(
    tmp_path: Path, backbone: str, layers: tuple[int, ...] | None
) -> None:
    config = dataclasses.replace(CONFIG, backbone=backbone, layers=layers)
    with pytest.raises(ConfigError, match=f"does not fit {backbone}") as caught:  # there is not even an image here
        check_options(options(tmp_path, tmp_path, config=config, half_weights=True))
    assert "transformer blocks" in caught.value.why
    check_options(options(tmp_path, tmp_path, half_weights=True))


def test_without_the_fp32_graph_there_is_nothing_to_halve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="half-weights"):
        quiet_build(options(tmp_path, tmp_path, precisions=("fp16",), half_weights=True))
