"""Fits the autoencoder to normal images: features once, then a resumable, seeded loop (paper section 4.1.2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from saae_runtime.errors import ConfigError, FitError
from saae_runtime.files import canonical_json, sha256_bytes
from saae_runtime.version import library_versions, saae_version

from ..config import TEXTURES, FitConfig
from ..data.category import Sample, distinct_names
from ..data.split import content_digest, content_hashes
from ..model.checkpoint import Checkpoint
from ..model.detector import LOSSES, SCORES, Detector
from ..model.saae import SAAE, check_shape
from ..model.vit import Features
from ..record import FitRecord
from .components import principal_components
from .features import cache_root, extract, pick_device
from .loop import Loop, Reporter
from .memory import remember

__all__ = ["Reporter", "check_scheme", "fit"]


def fit(
    backbone: Features,
    samples: Sequence[Sample],
    config: FitConfig,
    category: str,
    *,
    device: str | None = None,
    cache: Path | None = None,
    texture: bool | None = None,
    reporter: Reporter | None = None,
    held_out: Sequence[Sample] = (),
    synthetic: bool | None = None,
) -> Checkpoint:
    """Fit one category.

    The same samples, configuration and machine give the same weights, whether or not the run was interrupted: the
    order of images follows from the seed and the step, and a stopped run resumes from its last saved state. (On a GPU
    up to rounding, because sums have no fixed order.) The state stays until `save_checkpoint` or `discard_state`.

    Args:
        backbone: frozen features; its layers and input size override the configuration's.
        samples: normal images to fit on (without those held out for calibration).
        config: see `FitConfig`.
        category: product name.
        device: torch device, default the first GPU or the CPU.
        cache: folder of the feature cache and of resumable states.
        texture: whether the product is a texture (MLP size V) or an object (2V); None: by its name.
        reporter: progress.
        held_out: images kept out of the fit; the record names them.
        synthetic: whether the images were drawn; for the record.

    Raises:
        ConfigError: an unknown loss or score, one that needs components, or an impossible latent width or patch.
        FitError: the loss is not finite, or there are no images.
        DataError: an image cannot be read.
        StorageError: no room for the cache. (Where only the state has none, `reporter` is told and the fit goes on.)
    """
    if not samples:
        raise FitError("There are no images to fit to.", "The list of normal images is empty.", "add normal images")
    check_scheme(config)
    is_texture = category in TEXTURES if texture is None else texture
    config = _completed(config, backbone, is_texture)
    check_shape(config.latent, backbone.grid, config.saae_patch or 1)
    watch = reporter or Reporter()
    place = pick_device(device)
    started = time.monotonic()
    features = extract(backbone, samples, cache, place, config.precision, watch.features)
    seconds_features = time.monotonic() - started
    watch.say("principal components of the features")
    space, latent = principal_components(features, config)
    config = replace(config, latent=latent)
    state_key = {"features": features.key, "config": config.to_json(), "saae": saae_version()}
    state = (cache or cache_root()) / "states" / sha256_bytes(canonical_json(state_key).encode())
    torch.manual_seed(config.seed)
    saae = SAAE(
        space.channels,
        latent,
        backbone.grid[0] * backbone.grid[1],
        (config.mlp_ratio or 1) * latent,
        transformer=config.transformer,
        grid=backbone.grid,
        patch=config.saae_patch or 1,
    )
    loop = Loop(saae, space, features, config, place, state)
    history = loop.run(watch)
    space, saae = space.cpu(), saae.cpu().eval()
    memory, left_out = None, None
    if config.memory is not None:
        memory, left_out = remember(features, space, saae, samples, config, watch)
    detector = Detector(backbone.cpu(), space, saae, config.score, config.smoothing, memory)
    record = FitRecord(
        images=len(samples),
        digest=content_digest(samples),
        fitted_on=tuple(sorted(content_hashes(samples))),
        held_out=tuple(sorted(distinct_names([sample.path for sample in held_out]))),
        synthetic=synthetic,
        texture=is_texture,
        device=str(place),
        precision=loop.arithmetic,
        captured_steps=loop.captured_steps,
        seconds_features=round(seconds_features, 2),
        seconds_fit=round(loop.seconds, 2),
        loss=tuple(history),
        tools={"saae": saae_version(), **library_versions(("torch", "timm", "numpy"))},
    )
    return Checkpoint(detector, config, category, record, state, left_out)


def _completed(config: FitConfig, backbone: Features, texture: bool) -> FitConfig:
    """The configuration with the defaults that depend on backbone and product filled in."""
    return replace(
        config,
        layers=backbone.layers,
        input_size=backbone.input_size,
        mlp_ratio=config.mlp_ratio or (1 if texture else 2),
        saae_patch=(config.saae_patch or backbone.saae_patch) if config.transformer else 1,
        tiles=backbone.tiles.counts if len(backbone.tiles) > 1 else None,
    )


def check_scheme(config: FitConfig) -> None:
    """Check before the first image is read that loss, score, steps and components belong together.

    Raises:
        ConfigError: an unknown loss or score, one that needs components, or no steps without a memory.
    """
    if config.loss not in LOSSES:
        raise ConfigError(f"There is no loss named {config.loss!r}.", "", f"one of: {', '.join(LOSSES)}")
    if config.score not in SCORES:
        raise ConfigError(f"There is no score named {config.score!r}.", "", f"one of: {', '.join(SCORES)}")
    if config.steps == 0 and config.memory is None:
        raise ConfigError(
            "An autoencoder cannot be fitted in 0 steps.",
            "Without an autoencoder, only a memory of normal patches can score.",
            "give --steps, or --preset bank",
        )
    if config.score == "joint" and config.components is None:
        raise ConfigError(
            "The score `joint` needs components.", "Half of it is the energy outside them.", "give --components"
        )
