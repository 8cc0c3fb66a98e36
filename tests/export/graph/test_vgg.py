"""VGG19 as it is exported: equal to the Detector at its borders too, FP16 where it is said, taken by every library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import noise_frames, tiny_detector

from saae_export.graph.frame import MIDDLE
from saae_export.graph.fused import FusedGraph
from saae_export.graph.onnx_file import export_onnx, run_onnx, session
from saae_export.graph.vgg import GraphVGG
from saae_export.int8.qdq import weighted_products
from saae_export.parity.pytorch import TorchReference
from saae_train.model.detector import Detector

SIZE = (40, 60)
VARIANTS = {
    "dfr": {"transformer": False, "standardise": False},
    "patches": {"patch": 4, "standardise": False},
    "components": {"patch": 2, "components": 48, "score": "joint", "smoothing": 0.5},
}


def vgg_detector(layers: tuple[int, ...] = (1, 3, 6), **options: object) -> Detector:
    return tiny_detector(name="vgg19", size=(32, 48), layers=layers, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The ONNX file of a variant at a precision, exported once."""
    folder = tmp_path_factory.mktemp("vgg")

    @functools.cache
    def export(variant: str, precision: str) -> Path:
        graph = FusedGraph(vgg_detector(**VARIANTS[variant]), SIZE, precision)
        return export_onnx(graph, folder / f"{variant}.{precision}.onnx", 0.5)

    return export


@pytest.mark.parametrize(
    ("precision", "bound", "variant"),
    [*(("fp32", 1e-5, variant) for variant in VARIANTS), ("fp16", 5e-3, "components")],
)
def test_the_file_equals_the_detector(
    exported: Callable[[str, str], Path], precision: str, bound: float, variant: str
) -> None:
    detector = vgg_detector(**VARIANTS[variant])
    path = exported(variant, precision)
    frames = noise_frames(3, SIZE)
    outputs = run_onnx(session(path), frames)
    reference = TorchReference(detector, SIZE)
    for found, score, frame in zip(outputs["anomaly_map"], outputs["score"], frames, strict=True):
        right = reference(frame)
        expected, expected_score = right.anomaly_map, right.score
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
        assert abs(score - expected_score) <= bound * abs(expected_score)


def test_every_layer_with_the_border_of_the_image() -> None:
    """The first convolution pads with the mean colour: folding the mean into it would be wrong along it."""
    detector = vgg_detector(tuple(range(1, 13)))
    x = torch.from_numpy(noise_frames(2, (32, 48))).float()
    with torch.no_grad():
        expected = detector.features(x.permute(0, 3, 1, 2))
        found = GraphVGG(detector.backbone, torch.float32)(x - MIDDLE)  # type: ignore[arg-type]
    assert found.shape == expected.shape == (2, 8 * 12, 3456)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    border = expected.unflatten(1, (8, 12))[:, 0, :, :64] - expected.unflatten(1, (8, 12))[:, 4, :, :64]
    assert float(border.abs().max()) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_fp16_pytorch_computes_what_the_detector_does(variant: str) -> None:
    """Of every variant; one is exported in FP16, too."""
    detector = vgg_detector(**VARIANTS[variant])
    frames = noise_frames(3, SIZE)
    with torch.no_grad():
        maps, scores, _ = FusedGraph(detector, SIZE, "fp16").eval()(torch.from_numpy(frames), torch.ones(1))
    reference = TorchReference(detector, SIZE)
    for found, score, frame in zip(maps.numpy(), scores.numpy(), frames, strict=True):
        right = reference(frame)
        assert np.abs(found - right.anomaly_map).max() <= 5e-3 * np.abs(right.anomaly_map).max()
        assert abs(score - right.score) <= 5e-3 * abs(right.score)


def test_fp16_is_in_the_convolutions_alone() -> None:
    graph = FusedGraph(vgg_detector(transformer=False, standardise=False), SIZE, "fp16")
    for name, value in (*graph.backbone.named_parameters(), *graph.backbone.named_buffers()):
        assert value.dtype == (torch.float16 if name.startswith("convs.") else torch.float32), name


def test_the_graph_holds_no_operator_that_a_library_refuses(exported: Callable[[str, str], Path]) -> None:
    model = onnx.load(str(exported("patches", "fp32")))
    kinds = [node.op_type for node in model.graph.node]
    assert not {"Resize", "Upsample", "GridSample", "Loop", "If"} & set(kinds)
    assert kinds.count("Conv") == 6
    assert kinds.count("MaxPool") == 2
    # The alignment is no weight: it would lose the most and gain nothing in INT8.
    aligning = [node.name for node in model.graph.node if node.name.startswith("features/align/")]
    assert len(aligning) == 6
    assert not set(weighted_products(model)) & set(aligning)


@pytest.mark.needs("tensorrt_rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_it(exported: Callable[[str, str], Path], precision: str) -> None:
    from saae_export.tensorrt.compile import EngineOptions, compile_engine
    from saae_export.tensorrt.network import onnx_for_tensorrt
    from saae_runtime.backends.tensorrt.library import load_library

    path = exported("components", precision)
    built = compile_engine(
        load_library("tensorrt_rtx"),
        onnx_for_tensorrt(path),
        name=path.name,
        sms=("sm89",),
        options=EngineOptions(min_batch=1, opt_batch=2, max_batch=4),
    )
    assert len(built.data) > 100_000
    assert built.network.dtypes.get("uint8", 0) > 0
