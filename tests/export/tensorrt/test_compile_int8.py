"""INT8 engines: graphs with QuantizeLinear and DequantizeLinear built for real, and what is said of those refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from needs import need
from onnxruntime import quantization
from tiny_bundle import make_tiny_bundle
from typer.testing import CliRunner

from saae_export.cli.command import app
from saae_export.tensorrt.compile import compile_engine
from saae_export.tensorrt.network import onnx_for_tensorrt
from saae_runtime.bundle import open_bundle, update_bundle
from saae_runtime.errors import BackendError
from saae_runtime.manifest import Artefact

SIZE = (16, 24)


class Noise(quantization.CalibrationDataReader):
    """Two batches of noise."""

    def __init__(self, size):
        rng = np.random.default_rng(0)
        self._left = [{"frame": rng.integers(0, 256, (2, *size, 3), np.uint8)} for _ in range(2)]

    def get_next(self):
        return self._left.pop() if self._left else None


def quantise(source: Path, target: Path, size: tuple[int, int], signed: bool = True, bias: bool = False) -> Path:
    """Static Q/DQ: per-channel int8 weights, and activations symmetric where `signed`."""
    kinds = quantization.QuantType
    quantization.quantize_static(
        str(source),
        str(target),
        Noise(size),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=kinds.QInt8 if signed else kinds.QUInt8,
        weight_type=kinds.QInt8,
        per_channel=True,
        op_types_to_quantize=["Conv", "MatMul"],
        extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True, "QuantizeBias": bias},
    )
    return target


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused graph of a tiny model, FP32."""
    return exported(tmp_path_factory.mktemp("fused"), components=48, smoothing=0.5, score="cosine")


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused graph with convolutions and their biases; the one that the exporter's tests have, too."""
    vgg = {"name": "vgg19", "size": (32, 48), "layers": (1, 3, 6), "transformer": False, "standardise": False}
    return exported(tmp_path_factory.mktemp("convolutions"), (40, 60), **vgg)


def exported(folder: Path, frame_size: tuple[int, int] = (80, 100), **options) -> Path:
    need("torch")
    from tiny_models import tiny_detector

    from saae_export.graph.fused import FusedGraph
    from saae_export.graph.onnx_file import export_onnx

    return export_onnx(FusedGraph(tiny_detector(**options), frame_size), folder / "model.onnx", 0.5)


@pytest.mark.parametrize("sm", ["sm86", "sm89"])
def test_the_quantised_fused_graph_is_built(rtx, fused, tmp_path, sm):
    path = quantise(fused, tmp_path / "model.int8.onnx", (80, 100))
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    built = compile_engine(rtx, onnx_for_tensorrt(path), name=path.name, sms=(sm,))
    assert nodes.count("QuantizeLinear") > 20
    # Strongly typed: one int8 tensor for each QuantizeLinear, and for each weight that is int8 in the file already.
    assert built.network.dtypes["int8"] >= nodes.count("QuantizeLinear")
    assert {item.name: item.dtype.name for item in built.network.inputs} == {"frame": "uint8", "threshold": "float32"}
    assert {item.name: item.shape for item in built.network.outputs}["anomaly_map"] == (-1, 80, 100)


def test_the_int8_graph_of_build_is_built(rtx, fused, tmp_path):
    from tiny_models import noise_frames

    from saae_export.int8.choose import MIN_FRAMES, Quantiser

    quantiser = Quantiser(fused, list(noise_frames(MIN_FRAMES, (80, 100))), (80, 100))
    path = quantiser.write(tmp_path / "model.int8.onnx", quantiser.products)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    built = compile_engine(rtx, onnx_for_tensorrt(path), name=path.name, sms=("sm89",))
    assert len(quantiser.products) > 5
    assert built.network.dtypes["int8"] >= nodes.count("QuantizeLinear") > 0


@pytest.mark.parametrize(
    ("graph", "size", "options", "operator", "cure"),
    [
        ("fused", (80, 100), {"signed": False}, "QuantizeLinear", "zero points of 0"),
        ("convolutions", (40, 60), {"bias": True}, "DequantizeLinear", "leave biases unquantised"),
    ],
)
def test_what_tensorrt_does_not_take_is_told_with_its_cure(
    rtx, request, tmp_path, graph, size, options, operator, cure
):
    path = quantise(request.getfixturevalue(graph), tmp_path / "model.int8.onnx", size, **options)
    with pytest.raises(BackendError) as caught:
        compile_engine(rtx, onnx_for_tensorrt(path), name=path.name, sms=("sm89",))
    assert f"({operator})" in caught.value.why
    assert cure in caught.value.cure


def test_the_command_takes_the_int8_graph_of_the_bundle(rtx, tmp_path):
    bundle = open_bundle(make_tiny_bundle(tmp_path / "tiny", size=SIZE, precisions=("fp32", "fp16")))
    path = quantise(bundle.file("model.onnx"), tmp_path / "model.int8.onnx", SIZE)
    manifest = bundle.manifest
    manifest = dataclasses.replace(
        manifest,
        artefacts=(*manifest.artefacts, Artefact(path.name, "onnx", "int8")),
        thresholds={**manifest.thresholds, "int8": manifest.thresholds["fp32"]},
    )
    bundle = update_bundle(bundle, manifest, {path.name: path})
    command = ["engine", str(bundle.path), "--library", "tensorrt-rtx", "--for", "sm89", "--precision", "int8"]
    done = CliRunner().invoke(app, [*command, "--quiet"])
    assert done.exit_code == 0, done.output
    (engine,) = open_bundle(bundle.path).artefacts(kind="engine")
    assert engine.precision == "int8"
    assert "-int8-" in engine.file
    assert engine.options["source_sha256"] == bundle.sha256("model.int8.onnx")
