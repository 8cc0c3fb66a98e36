"""Models and bundles with random weights: right in every shape, without any quality, for measuring speed only."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from saae_export.staging import describe, export_graphs, provisional_bundle
from saae_runtime.bundle import Bundle
from saae_runtime.errors import ConfigError
from saae_runtime.manifest import Artefact, Calibration, Manifest
from saae_train.backbone import build_backbone
from saae_train.checkpoint import Checkpoint
from saae_train.detector import Detector, FeatureSpace
from saae_train.model import SAAE
from saae_train.presets import PAPER_BACKBONE, TEXTURES, FitConfig, default_layers, preset

__all__ = ["CATEGORY", "like", "random_bundle", "random_checkpoint", "random_config"]

CATEGORY = "random-weights"
_PAPER_LATENT = 300  # about what 80 % of the variance takes on the paper's categories


def random_config(
    backbone: str,
    preset_name: str | None = None,
    layers: Sequence[int] | None = None,
    input_size: tuple[int, int] | None = None,
    latent: int | None = None,
    components: int | None = None,
) -> FitConfig:
    """A preset's configuration with everything resolved that shapes the graph.

    Args:
        backbone: timm model name.
        preset_name: None: `paper` for the paper's backbone, else `fast`.
        layers, input_size, latent, components: instead of the preset's; `components` 0 means none.

    Raises:
        ConfigError: an unknown preset, or a backbone whose layers have to be named.
    """
    config = preset(preset_name or ("paper" if backbone == PAPER_BACKBONE else "fast"))
    if layers is None and config.layers is None:
        found, measured = default_layers(backbone, 0)
        if not measured:
            raise ConfigError(
                f"{backbone} has no layers of its own here.", "They shape the graph.", "name them: --layers 0,1,2,3,4"
            )
        layers = found
    config = config.replace(
        backbone=backbone,
        layers=None if layers is None else tuple(layers),
        input_size=input_size,
        latent=latent or config.latent or config.latent_limit or _PAPER_LATENT,
        components=components or None,
        mlp_ratio=config.mlp_ratio or 2,  # the larger of the paper's two: objects
    )
    return dataclasses.replace(config, components=None) if components == 0 else config


def random_checkpoint(config: FitConfig, seed: int = 0) -> Checkpoint:
    """A detector of exactly the shapes that `config` gives, with random weights.

    Raises:
        ConfigError: no such backbone, or sizes that do not fit.
    """
    if config.layers is None or config.latent is None:
        raise ConfigError("Layers and latent width must be known.", "", "use random_config")
    backbone = build_backbone(config.backbone, config.layers, config.input_size, "random", seed)
    width, positions = backbone.channels, backbone.grid[0] * backbone.grid[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, scale = torch.zeros(width), torch.ones(width)
        if config.standardise:
            mean, scale = 0.1 * torch.randn(width), 0.5 + torch.rand(width)
        basis = weights = None
        if config.components is not None and config.components < width:
            basis, _ = torch.linalg.qr(torch.randn(width, config.components))
            if config.component_power:
                weights = torch.linspace(0.5, 2.0, config.components)
        space = FeatureSpace(mean, scale, basis, weights)
        mlp = config.latent * (config.mlp_ratio or 2)
        saae = SAAE(space.channels, config.latent, positions, mlp, transformer=config.transformer)
    detector = Detector(backbone, space, saae.eval().requires_grad_(False), config.score, config.smoothing)
    return Checkpoint(detector, config, CATEGORY)


def random_bundle(
    checkpoint: Checkpoint, folder: Path, frame_size: tuple[int, int] | None, precisions: Sequence[str]
) -> Bundle:
    """A bundle of a model that nobody fitted; its thresholds are so high that nothing exceeds them.

    Args:
        checkpoint: from `random_checkpoint`.
        folder: the bundle's folder.
        frame_size: (H, W) baked into the graph; None: the model's own.
        precisions: `fp32`, `fp16`.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        files = export_graphs(checkpoint, Path(temporary), frame_size, precisions)
        manifest = describe(
            checkpoint,
            synthetic=True,
            frame_size=frame_size,
            calibration=Calibration(1, "0" * 64, held_out=False),
            thresholds={},
        )
        artefacts = tuple(Artefact(path.name, "onnx", name) for name, path in files.items())
        return provisional_bundle(folder, dataclasses.replace(manifest, artefacts=artefacts), files)


def like(manifest: Manifest) -> Checkpoint:
    """Random weights in the shapes of a bundle's model, for PyTorch's speed where its checkpoint is not at hand.

    Raises:
        ConfigError: the manifest does not hold the configuration of this version.
    """
    model = manifest.model
    config = FitConfig.from_json(model.config)
    config = dataclasses.replace(
        config,
        layers=tuple(model.layers),
        latent=model.latent_dim,
        components=model.components,
        input_size=(model.height, model.width),
        mlp_ratio=config.mlp_ratio or (1 if manifest.category in TEXTURES else 2),
    )
    checkpoint = random_checkpoint(config)
    if not np.array_equal(checkpoint.detector.backbone.grid, model.grid):
        raise ConfigError("The bundle's grid is not that of its backbone.", "", "give its model with --checkpoint")
    return checkpoint
