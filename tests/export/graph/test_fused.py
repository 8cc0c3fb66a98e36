"""The fused graph against the Detector that it was built from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import noise_frames, tiny_detector

from saae_export.graph.frame import MIDDLE
from saae_export.graph.fused import FusedGraph
from saae_export.graph.saae import GraphSAAE
from saae_export.graph.vit import GraphBlock, GraphViT, activation
from saae_export.parity.pytorch import TorchReference
from saae_runtime.errors import ConfigError
from saae_train.model.detector import Detector
from saae_train.model.vit import ViTFeatures
from saae_train.model.weights import WeightsInfo

VARIANTS = {
    "paper": {"standardise": False},
    "standardised": {"score": "cosine"},
    "components": {"components": 48, "smoothing": 0.6},
    "components cosine": {"components": 48, "score": "cosine"},
    "components joint": {"components": 48, "score": "joint"},
    "memory": {"components": 48, "score": "memory", "memory": 60, "smoothing": 0.5},
    "memory alone": {"components": 48, "score": "memory", "memory": 60, "alpha": 0.0},
    "memory, no components": {"score": "memory", "memory": 12},
    "cae": {"transformer": False},
    "patches": {"patch": 2, "size": (64, 96)},
    "a single layer": {"layers": (3,)},
    "all blocks, and no other": {"layers": (12,), "size": (32, 32)},
    "prefix and register tokens, LayerScale": {
        "name": "vit_small_patch14_reg4_dinov2",
        "size": (56, 70),
        "layers": (1, 2),
    },
    "middle layers": {"layers": (1, 3), "size": (64, 96)},
    "tiles": {"tiles": (2, 2), "size": (96, 112), "layers": (0, 1)},
    "tiles, prefix and register tokens": {
        "name": "vit_small_patch14_reg4_dinov2",
        "size": (84, 70),
        "layers": (1,),
        "tiles": (1, 2),
    },
}


def _run(graph: FusedGraph, frames: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with torch.no_grad():
        outputs = graph(torch.from_numpy(frames), torch.tensor([threshold]))
    return tuple(output.numpy() for output in outputs)  # type: ignore[return-value]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 5e-6), ("fp16", 2e-3)])
def test_graph_equals_detector(variant: str, precision: str, bound: float) -> None:
    detector = tiny_detector(**VARIANTS[variant])
    size = (90, 120)
    frames = noise_frames(2, size)
    maps, scores, masks = _run(FusedGraph(detector, size, precision), frames, 1.0)
    reference = TorchReference(detector, size)
    for frame, found, score, mask in zip(frames, maps, scores, masks, strict=True):
        right = reference(frame)
        expected, expected_score = right.anomaly_map, right.score
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
        assert abs(score - expected_score) <= bound * abs(expected_score)
        assert np.array_equal(mask.astype(bool), found > 1.0)


def test_model_size_is_the_default_and_has_no_resize() -> None:
    detector = tiny_detector()
    graph = FusedGraph(detector)
    assert graph.frame_size == (64, 64)
    assert graph.pixels.rows is None
    assert graph.pixels.columns is None
    frame = noise_frames(1, (64, 64))
    maps, _, _ = _run(graph, frame, 0.0)
    with torch.no_grad():
        plain = detector(torch.from_numpy(frame).permute(0, 3, 1, 2))
    # Every patch score stands in the map where its patch is centred: between two pixels of an even patch.
    centre = maps[0].reshape(4, 16, 4, 16)[:, 7:9, :, 7:9].mean(axis=(1, 3))
    assert np.allclose(centre, plain[0].numpy(), rtol=2e-2)


def test_an_autoencoder_that_says_nothing_leaves_the_graph() -> None:
    keywords = {"components": 48, "score": "memory", "memory": 60}
    assert FusedGraph(tiny_detector(**keywords, alpha=0.0)).saae is None
    assert FusedGraph(tiny_detector(**keywords)).saae is not None


def test_the_detector_is_left_as_it_was() -> None:
    detector = tiny_detector(components=48)
    before = copy.deepcopy(detector.state_dict())
    FusedGraph(detector, (80, 80), "fp16")
    after = detector.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_score_is_the_largest_value_of_the_map() -> None:
    maps, scores, _ = _run(FusedGraph(tiny_detector(smoothing=0.5), (50, 40)), noise_frames(3, (50, 40)), 0.0)
    assert np.array_equal(scores, maps.max(axis=(1, 2)))


def test_fp16_keeps_the_sensitive_steps_in_fp32() -> None:
    graph = FusedGraph(tiny_detector(components=48), (80, 100), "fp16")
    kinds = {name: value.dtype for name, value in (*graph.named_parameters(), *graph.named_buffers())}
    for name, kind in kinds.items():
        single = "norm" in name or name.startswith(
            (
                "pixels.",
                "backbone.proj",
                "backbone.position",
                "space.scale",
                "space.shift",
                "map.",
                "saae.position",
                "saae.decoder.res",
            )
        )
        assert kind == (torch.float32 if single else torch.float16), name


def test_a_weight_beyond_fp16_is_refused_by_name() -> None:
    detector = tiny_detector()
    detector.saae.decoder.convs[2].weight.data[0, 0] = 1e6
    FusedGraph(detector, precision="fp32")
    with pytest.raises(ConfigError, match=r"saae\.conv6\.weight") as caught:
        FusedGraph(detector, precision="fp16")
    assert "fp32" in caught.value.cure


def test_nan_weights_are_refused() -> None:
    detector = tiny_detector()
    detector.saae.decoder.convs[2].bias.data[0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        FusedGraph(detector)


def test_int8_is_not_a_graph_precision() -> None:
    with pytest.raises(ConfigError, match="int8"):
        FusedGraph(tiny_detector(), precision="int8")


def test_learned_queries_leave_the_graph() -> None:
    """The decoder's self-attention over the queries depends on no frame, so no weight of it is exported."""
    saae = tiny_detector().saae
    graph = GraphSAAE(saae, torch.float32)
    names = [name for name, _ in graph.named_parameters()]
    assert not any("self_attention" in name or "queries" in name for name in names)
    f = torch.randn(2, saae.positions, saae.channels)
    with torch.no_grad():
        assert torch.allclose(graph(f), saae(f), atol=1e-5)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        GraphSAAE(tiny_detector().saae.train(), torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_blocks_of_a_rarer_kind_are_copied_whole(precision: str) -> None:
    from timm.layers import GluMlp
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0, mlp_layer=GluMlp
    ).eval()
    vit.pretrained_cfg = {}
    backbone = ViTFeatures(vit, "test", (1, 2), WeightsInfo("random", "0" * 64))
    graph = GraphViT(backbone, torch.float16 if precision == "fp16" else torch.float32)
    assert not any(isinstance(block, GraphBlock) for block in graph.blocks)
    x = torch.from_numpy(noise_frames(2, (32, 32))).float()
    with torch.no_grad():
        assert torch.allclose(
            graph(x - MIDDLE)[:, graph.prefix_tokens :], backbone((x.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5), atol=2e-5
        )


def test_query_and_key_norms() -> None:
    """Models with normalised queries and keys cannot have 1/sqrt(d) folded into the projection."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, qk_norm=True, depth=1)
    block = vit.blocks[0].eval()
    torch.nn.init.normal_(block.attn.q_norm.weight)
    torch.nn.init.normal_(block.attn.k_norm.bias)
    x = torch.randn(2, 5, vit.embed_dim)
    with torch.no_grad():
        assert torch.allclose(GraphBlock(block, 5, torch.float32)(x), block(x), atol=1e-5)


def test_graph_vit_alone() -> None:
    detector: Detector = tiny_detector(size=(64, 80))
    x = torch.from_numpy(noise_frames(2, (64, 80))).float()
    with torch.no_grad():
        expected = detector.features(x.permute(0, 3, 1, 2))
        found = GraphViT(detector.backbone, torch.float32)(x - MIDDLE)
        assert torch.allclose(found[:, detector.backbone.prefix_tokens :], expected, atol=2e-5)


def test_gelu_is_pytorchs_and_other_activations_stay() -> None:
    x = torch.linspace(-8.0, 8.0, 4001)
    assert torch.allclose(activation(torch.nn.GELU())(x), torch.nn.functional.gelu(x), atol=1e-6)
    for other in (torch.nn.GELU(approximate="tanh"), torch.nn.SiLU()):
        assert torch.equal(activation(other)(x), other(x))
