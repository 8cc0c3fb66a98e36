"""ViT features against timm's own forward pass, over the kinds of ViT that timm has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from saae_runtime.errors import ConfigError
from saae_train.model.vit import ViTFeatures, build_backbone
from saae_train.model.weights import WeightsInfo

INFO = WeightsInfo("test", "0" * 64)
SIZE = (56, 84)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patch 16": {"patch_size": 16, "img_size": (48, 64)},
    "registers": {"reg_tokens": 4},
    "registers outside the position embedding": {"reg_tokens": 4, "no_embed_class": True},
    "class token outside the position embedding": {"no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers without class token": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "LayerScale": {"init_values": 0.5},
    "pre-norm": {"pre_norm": True},
    "query and key norms": {"qk_norm": True},
    "no biases": {"qkv_bias": False},
    "everything": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.3, "pre_norm": True, "qk_norm": True},
}


def make_vit(**options: Any) -> VisionTransformer:
    """A small ViT whose every weight is away from its initial value, so that one left out shows."""
    torch.manual_seed(0)
    arguments = {"img_size": SIZE, "patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 0}
    vit = VisionTransformer(**(arguments | options))
    vit.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}  # as timm.create_model sets it
    for parameter in vit.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return vit.eval()


def reference(vit: VisionTransformer, x: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """The maps z_i as timm computes them: the projection alone, and `forward_intermediates` for the blocks."""
    found = {0: vit.patch_embed.proj(x).flatten(2).transpose(1, 2)}
    blocks = [layer for layer in layers if layer]
    maps = vit.forward_intermediates(
        x, indices=[layer - 1 for layer in blocks], norm=False, output_fmt="NLC", intermediates_only=True
    )
    return found | dict(zip(blocks, maps, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_timms_own(variant: str) -> None:
    vit, layers = make_vit(**VARIANTS[variant]), (0, 1, 3)
    backbone = ViTFeatures(vit, variant, layers, INFO)
    x = torch.randn(2, 3, *backbone.input_size)
    with torch.inference_mode():
        expected = reference(vit, x, layers)
        maps = backbone.layer_maps(x)
        f = backbone(x)
    h, w = backbone.grid
    assert (h * backbone.patch, w * backbone.patch) == backbone.input_size
    for layer, found in zip(layers, maps, strict=True):
        assert found.shape == (2, h * w, 24)
        torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(f, torch.cat(maps, dim=2))  # eq. (1)
    assert f.shape[2] == backbone.channels == 3 * backbone.width


def test_layer_0_comes_before_the_position_embedding() -> None:
    vit = make_vit()
    x = torch.randn(1, 3, *SIZE)
    with torch.inference_mode():
        before = ViTFeatures(vit, "", (0, 1), INFO).layer_maps(x)
        vit.pos_embed.data.add_(5.0 * torch.randn_like(vit.pos_embed))
        after = ViTFeatures(vit, "", (0, 1), INFO).layer_maps(x)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 4)])
def test_blocks_above_the_highest_layer_are_cut_off(layers: tuple[int, ...]) -> None:
    vit = make_vit()
    backbone = ViTFeatures(vit, "", layers, INFO)
    assert len(backbone.blocks) == max(layers)
    x = torch.randn(1, 3, *SIZE)
    with torch.inference_mode():
        expected = backbone(x)
        for block in list(vit.blocks)[max(layers) :]:
            for parameter in block.parameters():
                parameter.data.fill_(float("nan"))
        torch.testing.assert_close(backbone(x), expected)
    assert torch.isfinite(expected).all()


def test_frozen_and_always_the_same() -> None:
    vit = make_vit(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    backbone = ViTFeatures(vit.train(), "", (1, 2), INFO)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    x = torch.randn(1, 3, *SIZE)
    assert torch.equal(backbone(x), backbone(x))
    assert not backbone(x).requires_grad


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", (160, 160)),
        ("test_vit2", (32, 64)),
        ("test_vit3", (64, 64)),
        ("vit_tiny_patch16_224", (32, 48)),
        ("deit_tiny_distilled_patch16_224", (32, 32)),  # two class tokens
        ("vit_wee_patch16_reg1_gap_256", (32, 32)),  # a register, no class token
        ("vit_small_patch14_reg4_dinov2", (28, 42)),
    ],
)
def test_models_by_name(name: str, size: tuple[int, int]) -> None:
    backbone = build_backbone(name, [2, 0, 2], size, "random", seed=3)
    assert backbone.layers == (0, 2)  # ascending, each once
    assert backbone.input_size == size
    assert backbone.weights.source.startswith("random")
    torch.manual_seed(3)
    vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        expected = reference(vit, x, backbone.layers)
        torch.testing.assert_close(backbone(x), torch.cat([expected[0], expected[2]], dim=2), rtol=1e-5, atol=1e-5)
    assert backbone.mean == tuple(vit.pretrained_cfg["mean"])
    assert backbone.std == tuple(vit.pretrained_cfg["std"])


def test_random_weights_follow_their_seed_and_leave_the_callers_alone() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = build_backbone("test_vit2", (1,), (32, 32), "random", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = build_backbone("test_vit2", (1,), (32, 32), "random", seed=1)
    other = build_backbone("test_vit2", (1,), (32, 32), "random", seed=2)
    assert one.weights == again.weights
    assert one.weights.sha256 != other.weights.sha256
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(one(x), again(x))
    assert not torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    ("name", "layers", "size", "what", "hints"),
    [
        ("vit_tiny_patch16_244", (1,), (32, 32), "no model named vit_tiny_patch16_244", ["vit_tiny_patch16_224"]),
        ("zzz", (1,), (32, 32), "no model named zzz", ["list_models"]),
        ("resnet18", (1,), (32, 32), "resnet18 is not a plain ViT", ["vit_small_patch14_dinov2"]),
        ("test_vit_relpos", (1,), (32, 32), "not a plain ViT", ["VisionTransformerRelPos"]),
        ("vit_tiny_r_s16_p8_224", (1,), (32, 32), "not a plain ViT", ["HybridEmbed"]),
        ("vit_tiny_patch16_224.nonsense", (1,), (32, 32), "cannot be built", ["nonsense"]),
        ("test_vit2", (9,), (32, 32), "no layer 9", ["blocks 1 to 8", "up to 8"]),
        ("test_vit2", (-1, 2), (32, 32), "not possible", ["0,1,2"]),
        ("test_vit2", (), (32, 32), "not possible", ["0,1,2"]),
        ("test_vit2", (1,), (40, 64), "cannot take 40 x 64 pixels", ["patch size 16", "--input-size 32x64"]),
        ("vit_small_patch14_dinov2", (1,), (384, 384), "cannot take 384 x 384", ["patch size 14", "378x378"]),
    ],
)
def test_what_cannot_be_built_says_what_can(
    name: str, layers: tuple[int, ...], size: tuple[int, int], what: str, hints: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone(name, layers, size, "random")
    assert what in caught.value.what
    assert caught.value.cure
    for hint in hints:
        assert hint in str(caught.value)


def test_normalised_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """AIMv2, made small: layer 0 and all that follow would lack the norm."""
    small = functools.partial(timm.create_model, depth=2, embed_dim=32, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    with pytest.raises(ConfigError, match="aimv2_large_patch14_224 is not a plain ViT") as caught:
        build_backbone("aimv2_large_patch14_224", (1, 2), (28, 28), "random")
    assert "normalised by a RmsNorm" in caught.value.why


def test_without_absolute_positions() -> None:
    with pytest.raises(ConfigError, match="no absolute position embedding"):
        ViTFeatures(make_vit(pos_embed="none"), "", (1,), INFO)
