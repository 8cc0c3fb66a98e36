"""VGG19 features against timm's own network and DFR's own steps; what cannot be built says what can."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from saae_runtime.errors import ConfigError, WeightsError
from saae_train.model.vgg import VGGFeatures, align_matrix
from saae_train.model.vit import build_backbone, choose_input_size, choose_layers

PAPER_LAYERS = range(1, 13)


@pytest.fixture(scope="module")
def vgg() -> VGGFeatures:
    backbone = build_backbone("vgg19", PAPER_LAYERS, (64, 96), "random", seed=1)
    assert isinstance(backbone, VGGFeatures)
    return backbone


def reference(features: torch.nn.Sequential, x: torch.Tensor, layers: set[int]) -> list[torch.Tensor]:
    """DFR's regional feature generator, step by step on timm's own layers: to the image's size, then means of 4 x 4."""
    size, maps, count = x.shape[2:], [], 0
    for module in features:
        x = module(x)
        if isinstance(module, torch.nn.ReLU):
            count += 1
            if count in layers:
                large = functional.interpolate(x, size, mode="bilinear", align_corners=True)
                maps.append(functional.avg_pool2d(large, 4))
    return maps


def timms(backbone: VGGFeatures) -> torch.nn.Sequential:
    """timm's convolutional part with the weights of ours."""
    with torch.device("meta"):
        features = timm.create_model("vgg19", pretrained=False).features.to_empty(device="cpu")
    convs = [module for module in features if isinstance(module, torch.nn.Conv2d)]
    for ours, theirs in zip(backbone.convs, convs, strict=False):
        theirs.load_state_dict(ours.state_dict())
    return features[: list(features).index(convs[len(backbone.convs) - 1]) + 2]


def test_features_are_the_networks_own_aligned_as_dfr_does(vgg: VGGFeatures) -> None:
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = reference(timms(vgg), x, set(vgg.layers))
        maps, f = vgg.layer_maps(x), vgg(x)
    assert vgg.widths == (64, 64, 128, 128, *[256] * 4, *[512] * 4)
    assert vgg.channels == 3456  # section 4.3: 64 x 64 x 3456
    assert vgg.grid == (16, 24)
    for found, right in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, right.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(f, torch.cat(maps, dim=2))


@pytest.mark.parametrize(("layers", "size"), [((1,), (20, 24)), ((5, 3), (32, 36)), ((16,), (32, 64)), ((9,), (8, 40))])
def test_any_layers_at_any_multiple_of_the_stride(layers: tuple[int, ...], size: tuple[int, int]) -> None:
    backbone = build_backbone("vgg19", layers, size, "random")
    assert backbone.layers == tuple(sorted(layers))
    assert len(backbone.convs) == max(layers)  # what lies above is cut off
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        f = backbone(x)
        expected = torch.cat(reference(timms(backbone), x, set(layers)), dim=1)
    assert backbone.grid == (size[0] // 4, size[1] // 4)
    torch.testing.assert_close(f, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_in", "pixels"), [(64, 64), (32, 64), (16, 64), (8, 64), (4, 64), (1, 8), (256, 256)])
def test_alignment_along_one_axis(n_in: int, pixels: int) -> None:
    x = torch.randn(1, 1, n_in)
    expected = functional.interpolate(x[..., None], (pixels, 1), mode="bilinear", align_corners=True)[..., 0]
    expected = functional.avg_pool1d(expected, 4)
    torch.testing.assert_close(x @ torch.tensor(align_matrix(n_in, pixels)).T, expected, rtol=1e-5, atol=1e-6)


def test_alignment_is_not_rounded_where_the_convolutions_are(vgg: VGGFeatures) -> None:
    x = 1.0 + 1e-4 * torch.randn(1, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        aligned = vgg.align(x, 2)
    assert torch.equal(aligned, vgg.align(x, 2))
    assert aligned.dtype == torch.float32


def test_frozen_and_from_its_seed(vgg: VGGFeatures) -> None:
    assert not any(parameter.requires_grad for parameter in vgg.parameters())
    again = build_backbone("vgg19", PAPER_LAYERS, (64, 96), "random", seed=1)
    other = build_backbone("vgg19", (1, 2), (64, 96), "random", seed=2)
    assert again.weights == vgg.weights
    assert other.weights.sha256 != vgg.weights.sha256
    # Nothing of the geometry is saved: it is rebuilt.
    assert all(key.startswith("convs.") for key in vgg.state_dict())


def test_the_papers_choice_is_the_default() -> None:
    assert choose_layers("vgg19") == (tuple(PAPER_LAYERS), True)
    assert choose_layers("vgg19.tv_in1k") == (tuple(PAPER_LAYERS), True)
    assert choose_input_size("vgg19") == (256, 256)


@pytest.mark.parametrize(
    ("layers", "size", "what", "hints"),
    [
        ((0, 1), (64, 64), "vgg19 has no layer 0", ["patch projection", "1 to 16"]),
        ((17,), (64, 64), "vgg19 has no layer 17", ["1 to 16"]),
        ((), (64, 64), "not possible", ["1-12"]),
        ((12,), (60, 64), "cannot take 60 x 64 pixels", ["multiples of 8", "--input-size 64x64"]),
        ((16,), (40, 64), "cannot take 40 x 64 pixels", ["multiples of 16", "--input-size 32x64"]),
        ((1,), (30, 64), "cannot take 30 x 64 pixels", ["multiples of 4", "--input-size 32x64"]),
    ],
)
def test_what_cannot_be_built_says_what_can(
    layers: tuple[int, ...], size: tuple[int, int], what: str, hints: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone("vgg19", layers, size, "random")
    assert what in caught.value.what
    for hint in hints:
        assert hint in str(caught.value)


def test_an_unknown_tag_and_the_networks_relatives() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        build_backbone("vgg19.nonsense", (1,), (32, 32), "random")
    with pytest.raises(ConfigError, match="vgg16 is not a plain ViT") as caught:
        build_backbone("vgg16", (1,), (32, 32), "random")
    assert "vgg19" in caught.value.why


def test_weights_from_a_file(tmp_path: Path, vgg: VGGFeatures) -> None:
    """With timm's keys, which for this part are torchvision's as well; a classifier in the file is not needed."""
    with torch.device("meta"):
        features = timm.create_model("vgg19", pretrained=False).features
    torch.manual_seed(5)
    state = {f"features.{key}": torch.randn(value.shape) * 0.05 for key, value in features.state_dict().items()}
    path = tmp_path / "vgg.safetensors"
    save_file(state | {"head.fc.weight": torch.zeros(2, 2)}, path)
    backbone = build_backbone("vgg19", (1, 3), (32, 32), path)
    assert torch.equal(backbone.convs[2].weight, state["features.5.weight"])
    assert backbone.weights.source == path.name

    del state["features.7.bias"]
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"does not fit vgg19") as caught:
        build_backbone("vgg19", (1, 3), (32, 32), path)
    assert "features.7.bias" in caught.value.why

    save_file(state | {"features.7.bias": torch.zeros(128), "features.99.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"features\.99\.weight"):
        build_backbone("vgg19", (1, 3), (32, 32), path)

    save_file(state | {"features.7.bias": torch.full((128,), float("nan"))}, path)
    with pytest.raises(WeightsError, match="NaN"):
        build_backbone("vgg19", (1, 3), (32, 32), path)


def test_there_are_no_packaged_weights() -> None:
    with pytest.raises(WeightsError, match="no packaged weights for vgg19"):
        build_backbone("vgg19", (1,), (32, 32), "packaged")
