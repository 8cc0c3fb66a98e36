"""Frozen features: the stacked maps f of paper section 3.1, eq. (1), from any timm ViT; VGG19 has its own file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import lru_cache

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from saae_runtime.errors import ConfigError, WeightsError

from ..config import default_layers, measured_size
from .sizes import check_size
from .tiles import Tiles
from .vgg import VGGFeatures, bare_vgg, build_vgg, check_vgg, is_vgg
from .weights import WeightsInfo, load_into, load_state_dict, random_info

__all__ = [
    "Features",
    "ViTFeatures",
    "bare_backbone",
    "build_backbone",
    "check_backbone",
    "choose_input_size",
    "choose_layers",
    "patch_size",
]

# Unknown keys with these prefixes would change the features; others (heads, masks of pretraining) would not.
_PART_OF_FEATURES = ("blocks.", "patch_embed.", "norm_pre.", "pos_embed", "cls_token", "dist_token", "reg_token")


class ViTFeatures(nn.Module):
    """The first blocks of a ViT, giving the stacked features f.

    Layer 0 is the output of the patch projection before the position embedding is added (z0); layer i is the output
    of block i. Class and register tokens are dropped. Blocks above the highest layer are cut off.

    With tiles the ViT runs on overlapping windows, and the maps are those of the whole input, each position from the
    window where it is most central.

    Attributes:
        name: timm model name.
        layers: ascending layer indices.
        tiles: the windows, one without tiles.
        input_size: (height, width) in pixels, of all windows together.
        patch: patch size P in pixels.
        grid: (h, w) = input size / P.
        width: D, channels of one layer.
        channels: U = len(layers) * D.
        mean, std: normalisation of an RGB image scaled to 0..1, three floats each.
        weights: what was loaded.
        saae_patch: the SAAE's default patch size (paper section 4.1.2: 1).
    """

    saae_patch = 1

    def __init__(
        self,
        vit: VisionTransformer,
        name: str,
        layers: Sequence[int],
        weights: WeightsInfo,
        tiles: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.name = name
        self.layers = tuple(layers)
        self.weights = weights
        self.patch_embed = vit.patch_embed
        self.prefix_tokens = int(vit.num_prefix_tokens)
        self.patch = int(vit.patch_embed.patch_size[0])
        size = vit.patch_embed.img_size
        self.tiles = Tiles.over((int(size[0]) // self.patch, int(size[1]) // self.patch), tiles)
        self.saae_patch = self.tiles.saae_patch
        self.grid = self.tiles.grid
        self.input_size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        self.width = int(vit.embed_dim)
        self.channels = self.width * len(self.layers)
        config = vit.pretrained_cfg or {}
        self.mean = tuple(float(value) for value in config.get("mean", (0.5, 0.5, 0.5)))
        self.std = tuple(float(value) for value in config.get("std", (0.5, 0.5, 0.5)))
        self.norm_pre = vit.norm_pre
        self.blocks = nn.ModuleList(list(vit.blocks)[: max(self.layers)])
        prefix, position = _fixed_tokens(vit)
        self.register_buffer("prefix", prefix)
        self.register_buffer("position", position)
        self.register_buffer("place", self.tiles.index() if len(self.tiles) > 1 else None, persistent=False)
        self.prefix: Tensor
        self.position: Tensor
        self.place: Tensor | None
        self.eval().requires_grad_(False)

    def layer_maps(self, x: Tensor) -> list[Tensor]:
        """The maps z_i of the chosen layers.

        Args:
            x: float, N x 3 x H x W, normalised with `mean` and `std`, of `input_size`.

        Returns:
            One N x (h*w) x D tensor per layer, ascending.
        """
        if self.place is not None:
            x = self.tiles.cut(x, self.patch)
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        maps = [tokens] if 0 in self.layers else []
        tokens = tokens + self.position
        if self.prefix_tokens:
            tokens = torch.cat([self.prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.norm_pre(tokens)
        for index, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if index in self.layers:
                maps.append(tokens[:, self.prefix_tokens :])
        return maps if self.place is None else [self.tiles.join(rows, self.place) for rows in maps]

    def forward(self, x: Tensor) -> Tensor:
        """The stacked features f = cat(z_i), eq. (1): N x (h*w) x U."""
        return torch.cat(self.layer_maps(x), dim=2)


Features = ViTFeatures | VGGFeatures
"""A frozen extractor: name, layers, tiles, input_size, patch, grid, channels, mean, std, weights, saae_patch,
layer_maps."""


def _fixed_tokens(vit: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Class and register tokens with their part of the position embedding, and the patches' part.

    timm has two conventions (`no_embed_class`: the position embedding covers the patches alone).
    """
    # A distilled ViT (DeiT) has a second class token.
    every = (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token)
    prefix = [token for token in every if token is not None]
    tokens = torch.cat([token.detach() for token in prefix], dim=1) if prefix else torch.zeros(1, 0, vit.embed_dim)
    if vit.pos_embed is None:
        raise ConfigError(
            "This ViT has no absolute position embedding.",
            "Relative or rotary positions are not supported in the fused graph.",
            "choose a plain ViT such as vit_base_patch16_384 or vit_small_patch14_dinov2",
        )
    embedding = vit.pos_embed.detach()
    if vit.no_embed_class:
        return tokens, embedding
    count = tokens.shape[1]
    return tokens + embedding[:, :count], embedding[:, count:]


def choose_layers(name: str) -> tuple[tuple[int, ...], bool]:
    """The default layers, and whether they were measured for this backbone (otherwise they are a guess).

    Args:
        name: timm model name; an unknown name or another kind of model gets layer 1; `build_backbone` reports it.
    """
    layers, measured = default_layers(name, 0)
    if measured:
        return layers, True
    shape = _shape(name)
    return ((1,), False) if shape is None else default_layers(name, shape[0])


def choose_input_size(name: str) -> tuple[int, int]:
    """The default (height, width): the size at which the backbone was measured, else its pretraining size.

    Args:
        name: timm model name; an unknown name or another kind of model gets 224; `build_backbone` reports it.

    Returns:
        Multiples of the patch size.
    """
    measured = measured_size(name)
    if measured is not None:
        return measured
    shape = _shape(name)
    if shape is None:
        return 224, 224
    _, patch, (height, width) = shape
    return max(1, round(height / patch)) * patch, max(1, round(width / patch)) * patch


def patch_size(name: str) -> int | None:
    """Patch size in pixels; None if the backbone is not a ViT."""
    if is_vgg(name):
        return None
    shape = _shape(name)
    return None if shape is None else shape[1]


@lru_cache(maxsize=8)
def _shape(name: str) -> tuple[int, int, tuple[int, int]] | None:
    """(blocks, patch size, pretrained height and width) of a timm ViT; None for other or unknown models."""
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0)
        _, height, width = vit.pretrained_cfg["input_size"]
        return len(vit.blocks), int(vit.patch_embed.patch_size[0]), (int(height), int(width))
    except Exception:  # another kind of model lacks these attributes
        return None


def build_backbone(
    name: str,
    layers: Sequence[int],
    input_size: tuple[int, int],
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    tiles: tuple[int, int] = (1, 1),
) -> Features:
    """Build the frozen feature extractor.

    Args:
        name: timm model name of a plain ViT, patch 14 or 16 (others work if they divide the input size), or vgg19.
        layers: layer indices, 0 = patch projection; of vgg19 the convolutions from 1.
        input_size: (height, width) of a window, multiples of the patch size (of vgg19: of the deepest layer's stride).
        weights: see `saae_train.model.weights.load_state_dict`; `random` for measuring speed only, see `refuse_random`.
        seed: of the random weights.
        tiles: (rows, columns) of windows.

    Raises:
        ConfigError: an unknown model or layer, not a plain ViT, a size that its patch does not divide, tiles of vgg19.
        WeightsError: weights missing or not fitting.
    """
    if is_vgg(name):
        if tiles != (1, 1):
            raise ConfigError(
                "vgg19 does not support tiles.",
                "Tiles are windows of a ViT.",
                "leave --tiles out, or give a larger --input-size",
            )
        return build_vgg(name, layers, input_size, weights, seed)
    vit = _create(name, input_size, seed)
    chosen = _check_layers(name, layers, len(vit.blocks))
    if weights is not None and os.fspath(weights) == "random":
        info = random_info(vit.state_dict())
    else:
        info = _load(vit, name, weights)
    return ViTFeatures(vit, name, chosen, info, tiles)


def bare_backbone(
    name: str,
    layers: Sequence[int],
    input_size: tuple[int, int],
    info: WeightsInfo,
    tiles: tuple[int, int] = (1, 1),
) -> Features:
    """The extractor's modules without weights, for reading a checkpoint; arguments as saved."""
    if is_vgg(name):
        return bare_vgg(name, layers, input_size, info)
    return ViTFeatures(
        timm.create_model(name, pretrained=False, num_classes=0, img_size=input_size), name, layers, info, tiles
    )


def check_backbone(name: str, layers: Sequence[int], input_size: tuple[int, int]) -> None:
    """Check layers and input size as `build_backbone` does, without building it.

    Args:
        name: timm model name; an unknown name or another kind of model passes; `build_backbone` reports it.
        layers, input_size: see `build_backbone`.

    Raises:
        ConfigError: no such layer, or a size that the patch does not divide.
    """
    if is_vgg(name):
        check_vgg(name, layers, input_size)
        return
    shape = _shape(name)
    if shape is not None:
        _check_layers(name, layers, shape[0])
        check_size(name, input_size, shape[1], f"Its patch size {shape[1]} does not divide that.")


def _check_layers(name: str, layers: Sequence[int], blocks: int) -> list[int]:
    """The layers in order, if a ViT of that many blocks has them."""
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0:
        raise ConfigError(
            f"Layers {list(layers)} are not possible.", "Layer 0 is the patch projection.", "e.g. 0,1,2,3,4"
        )
    if chosen[-1] > blocks:
        raise ConfigError(
            f"{name} has no layer {chosen[-1]}.",
            f"It has blocks 1 to {blocks}, and layer 0, the patch projection.",
            f"choose layers up to {blocks}",
        )
    return chosen


def _create(name: str, input_size: tuple[int, int], seed: int) -> VisionTransformer:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("vit*"), n=3)
        raise ConfigError(
            f"timm has no model named {name}.",
            f"Near names: {', '.join(near)}." if near else "",
            "python -c \"import timm; print(timm.list_models('vit*'))\"",
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=input_size)
    except TypeError as error:  # a convolutional network takes no image size
        raise _not_plain(name, str(error)) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be built at {input_size[0]} x {input_size[1]}.",
            str(error),
            "choose another --backbone or --input-size",
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise _not_plain(name, f"It is a {type(vit).__name__}")
    if not isinstance(vit.patch_embed, PatchEmbed):
        raise _not_plain(name, f"Its patches come from a {type(vit.patch_embed).__name__}")
    if not isinstance(vit.patch_embed.norm, nn.Identity):
        raise _not_plain(name, f"Its patches are normalised by a {type(vit.patch_embed.norm).__name__}")
    patch = int(vit.patch_embed.patch_size[0])
    check_size(name, input_size, patch, f"Its patch size {patch} does not divide that.")
    return vit


def _not_plain(name: str, found: str) -> ConfigError:
    return ConfigError(
        f"{name} is not a plain ViT.",
        f"{found}; only timm's VisionTransformer family (and vgg19) has the layers that the method needs.",
        "choose e.g. vit_base_patch16_384 or vit_small_patch14_dinov2",
    )


def _load(vit: VisionTransformer, name: str, weights: str | os.PathLike[str] | None) -> WeightsInfo:
    state, info = load_state_dict(name, weights)
    try:
        fitted = checkpoint_filter_fn(state, vit)  # resamples the position embedding to this input size
    except Exception as error:
        raise WeightsError(
            f"{info.source} does not fit {name}.", str(error), "check that file and --backbone belong together"
        ) from error
    # The final norm and the head come after every usable layer.
    load_into(vit, fitted, info, name, unused=("norm.", "fc_norm.", "head"), part=_PART_OF_FEATURES)
    return info
