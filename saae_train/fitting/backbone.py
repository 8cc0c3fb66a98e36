"""Builds the backbone for a configuration and the training images: its layers, input size and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..config import FitConfig
from ..data.category import Sample
from ..data.shape import ImageShape, follow_shape, typical_shape
from ..model.saae import check_shape
from ..model.tiles import tiles_for
from ..model.vgg import PIXELS, VGGFeatures
from ..model.vit import Features, ViTFeatures, build_backbone, check_backbone, choose_layers, patch_size
from ..model.weights import refuse_random

__all__ = ["backbone_for", "check_geometry"]


def backbone_for(
    config: FitConfig,
    samples: Sequence[Sample],
    weights: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Features:
    """Build the frozen features of a fit.

    Args:
        config: names the backbone; without layers, the backbone's default ones; the input size follows the images'
            shape if `follow_shape` is set.
        samples: the images to fit on.
        weights: see `saae_train.model.weights.load_state_dict`.
        say: called with a text for each choice that the user may want to change.

    Raises:
        ConfigError: no such model, layer or size.
        WeightsError: weights missing, random, or not fitting.
        ImageError: an image cannot be read.
    """
    layers = config.layers
    if layers is None:
        layers, measured = choose_layers(config.backbone)
        if not measured:
            listed = ", ".join(map(str, layers))
            say(f"layers {listed}: the middle third, a guess; this backbone was not measured. Choose: --layers")
    size, tiles = _geometry(config, samples, say)
    backbone = build_backbone(config.backbone, layers, size, weights, tiles=tiles)
    refuse_random(backbone.weights.source, backbone.name)
    return backbone


def check_geometry(config: FitConfig) -> None:
    """Check layers and input size before the images are known, as far as they do not change the size.

    Raises:
        ConfigError: no such layer, or patches of the backbone or of the autoencoder that do not divide the size.
    """
    step = patch_size(config.backbone)
    follows = config.follow_shape and step is not None
    size = (step, step) if follows and step else config.input_size  # one that follows the images is a multiple
    check_backbone(config.backbone, config.layers or choose_layers(config.backbone)[0], size)
    if config.transformer and config.tiles is None and not follows:
        patch = config.saae_patch or (ViTFeatures if step else VGGFeatures).saae_patch
        height, width = config.input_size
        check_shape(config.latent, (height // (step or PIXELS), width // (step or PIXELS)), patch)


def _geometry(
    config: FitConfig, samples: Sequence[Sample], say: Callable[[str], None]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a window in pixels, and (rows, columns) of windows."""
    step = patch_size(config.backbone)
    shape = typical_shape(samples) if step is not None else None
    asked = config.tiles or (1, 1)
    if step is None or shape is None:
        return config.input_size, asked
    tiles = tiles_for(shape.size, config.input_size) if asked == (0, 0) else asked
    size = config.input_size
    if config.follow_shape:
        size = follow_shape(config.input_size, (shape.size[0] * tiles[1], shape.size[1] * tiles[0]), step)
    _say_geometry(config, shape, size, tiles, say)
    return size, tiles


def _say_geometry(
    config: FitConfig, shape: ImageShape, size: tuple[int, int], tiles: tuple[int, int], say: Callable[[str], None]
) -> None:
    """Report the choices that the user may want to change."""
    text = f"{size[0]} x {size[1]}"
    if config.follow_shape and shape.mixed:
        say(
            f"the images' shapes differ (height / width by a factor of {shape.spread:.1f}): all are brought to "
            f"{text}, the shape of the typical one. Choose: --input-size"
        )
    elif config.follow_shape and size != config.input_size:
        say(f"input {text}, after the images' shape {shape.size[0]} x {shape.size[1]}")
    if tiles != (1, 1):
        say(f"{tiles[0]} x {tiles[1]} tiles of {text} pixels that overlap")
    elif (wanted := tiles_for(shape.size, config.input_size)) != (1, 1):
        zoom = max(side / seen for side, seen in zip(shape.size, size, strict=True))
        say(
            f"one of the model's pixels stands for {zoom:.1f} of the image's: where small defects matter, "
            f"--tiles {wanted[0]}x{wanted[1]} sees them larger, for {wanted[0] * wanted[1]} times the work"
        )
