"""Models and bundles with random weights and the right shapes, only for measuring speed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from saae_export.artefacts import onnx_file
from saae_export.graph.fused import GRAPH_PRECISIONS
from saae_export.int8.qdq import insert_qdq, observe, weighted_products
from saae_export.pipeline.bundle import describe, provisional_bundle, write_graphs
from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.bundle import Bundle
from saae_runtime.errors import ConfigError
from saae_runtime.manifest import IN_BF16, Artefact, Calibration, Manifest
from saae_train.config import PAPER_BACKBONE, TEXTURES, FitConfig, default_layers, preset
from saae_train.model.checkpoint import Checkpoint
from saae_train.model.detector import Detector, FeatureSpace
from saae_train.model.memory import SEARCH, Memory
from saae_train.model.saae import SAAE
from saae_train.model.vit import build_backbone

__all__ = ["CATEGORY", "like", "random_bundle", "random_checkpoint", "random_config", "without_components"]

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
    """A preset's configuration with everything resolved that decides the graph's shapes.

    Args:
        backbone: timm model name of a ViT, or vgg19.
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
        patch = config.saae_patch or backbone.saae_patch
        saae = SAAE(space.channels, config.latent, positions, mlp, 3, config.transformer, backbone.grid, patch)
        memory = None
        if config.memory is not None:
            width = space.channels
            entries, search = torch.randn(config.memory, width), None if basis is None else SEARCH
            memory = Memory(entries, torch.ones(config.memory), torch.ones(width), 0.1, search)
    detector = Detector(backbone, space, saae.eval().requires_grad_(False), config.score, config.smoothing, memory)
    return Checkpoint(detector, config, CATEGORY)


def random_bundle(
    checkpoint: Checkpoint, folder: Path, frame_size: tuple[int, int] | None, precisions: Sequence[str]
) -> Bundle:
    """A bundle of a model with random weights; its thresholds are so high that nothing exceeds them.

    Args:
        checkpoint: from `random_checkpoint`.
        folder: the bundle's folder.
        frame_size: (H, W) baked into the graph; None: the model's own.
        precisions: of `saae_runtime.manifest.PRECISIONS`. bf16 is left out if nothing here computes it;
            INT8 has every product quantised, with ranges from noise.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        place = Path(temporary)
        files = write_graphs(checkpoint, place, frame_size, [name for name in precisions if name in GRAPH_PRECISIONS])
        if {"int8", "int8-bf16"} & set(precisions):
            files["int8"] = _int8(files["fp32"], place / onnx_file("int8"), frame_size or checkpoint.config.input_size)
        manifest = describe(
            checkpoint,
            synthetic=True,
            frame_size=frame_size,
            calibration=Calibration(1, "0" * 64, held_out=False),
            thresholds={},
        )
        named = [name for name in precisions if name not in IN_BF16 or not bf16_missing()]
        artefacts = tuple(Artefact(onnx_file(name), "onnx", name) for name in named)
        return provisional_bundle(folder, dataclasses.replace(manifest, artefacts=artefacts), files)


def _int8(graph: Path, target: Path, frame_size: tuple[int, int]) -> Path:
    model = onnx.load(graph)
    noise = np.random.default_rng(0).integers(0, 256, (2, *frame_size, 3), dtype=np.uint8)
    observed = observe(model, list(noise))
    products = weighted_products(model)
    target.write_bytes(
        insert_qdq(model, {name: observed[products[name][0]].largest for name in products}).SerializeToString()
    )
    return target


def without_components(checkpoint: Checkpoint) -> Checkpoint:
    """Random weights in the same shapes, except that the autoencoder works in all U channels."""
    config = dataclasses.replace(checkpoint.config, components=None)
    # Half of the joint score is the energy outside the components.
    score = "cosine" if config.score == "joint" else config.score
    return random_checkpoint(dataclasses.replace(config, score=score))


def like(manifest: Manifest) -> Checkpoint:
    """Random weights in the shapes of a bundle's model, for PyTorch's speed without its checkpoint.

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
