"""The backbone that a configuration and the training images ask for: its layers, its input size, its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..config import FitConfig
from ..data.category import Sample
from ..data.shape import follow_shape, typical_shape
from ..model.vit import Features, build_backbone, choose_layers, patch_size
from ..model.weights import refuse_random

__all__ = ["backbone_for"]


def backbone_for(
    config: FitConfig,
    samples: Sequence[Sample],
    weights: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Features:
    """Builds the frozen features of a fit.

    Args:
        config: names the backbone; layers that it leaves out are the backbone's own, and its input size takes the
            images' shape where it says so.
        samples: the images to fit on.
        weights: see `saae_train.model.weights.load_state_dict`.
        say: told what was chosen that a person may want to change.

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
    backbone = build_backbone(config.backbone, layers, _input_size(config, samples, say), weights)
    refuse_random(backbone.weights.source, backbone.name)
    return backbone


def _input_size(config: FitConfig, samples: Sequence[Sample], say: Callable[[str], None]) -> tuple[int, int]:
    step = patch_size(config.backbone) if config.follow_shape else None
    shape = typical_shape(samples) if step is not None else None
    if step is None or shape is None:
        return config.input_size
    size = follow_shape(config.input_size, shape.size, step)
    if shape.mixed:
        say(
            f"the images' shapes differ (height / width by a factor of {shape.spread:.1f}): all are brought to "
            f"{size[0]} x {size[1]}, the shape of the typical one. Choose: --input-size"
        )
    elif size != config.input_size:
        say(f"input {size[0]} x {size[1]}, after the images' shape {shape.size[0]} x {shape.size[1]}")
    return size
