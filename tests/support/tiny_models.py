"""Tiny detectors with random weights: everything the real ones have, in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from saae_train.data.category import Sample
from saae_train.model.detector import Detector, FeatureSpace
from saae_train.model.memory import Memory
from saae_train.model.saae import SAAE
from saae_train.model.vit import build_backbone

TINY = "vit_tiny_patch16_224"


def tiny_detector(
    *,
    name: str = TINY,
    size: tuple[int, int] = (64, 64),
    layers: tuple[int, ...] = (0, 1, 2),
    components: int | None = None,
    score: str = "l2",
    smoothing: float = 0.0,
    standardise: bool = True,
    transformer: bool = True,
    latent: int = 24,
    patch: int = 1,
    memory: int | None = None,
    alpha: float = 0.2,
    beta: float = 0.3,
    tiles: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Detector:
    """A detector whose every weight is away from its initial zero or one, so that a forgotten one shows."""
    torch.manual_seed(seed)
    backbone = build_backbone(name, layers, size, "random", seed, tiles)
    for key, value in backbone.named_parameters():
        if key.endswith("gamma"):
            value.data.uniform_(0.5, 1.5)
        elif value.ndim == 1:
            value.data.add_(torch.randn_like(value) * 0.1)
    width = backbone.channels
    mean = torch.randn(width) * 0.3 if standardise else torch.zeros(width)
    scale = torch.rand(width) + 0.5 if standardise else torch.ones(width)
    if components is None:
        space = FeatureSpace(mean, scale)
    else:
        basis, _ = torch.linalg.qr(torch.randn(width, components))
        space = FeatureSpace(mean, scale, basis, torch.linspace(1, 3, components))
    positions = backbone.grid[0] * backbone.grid[1]
    saae = SAAE(space.channels, latent, positions, transformer=transformer, grid=backbone.grid, patch=patch)
    for key, value in saae.named_parameters():
        if value.ndim == 1:
            value.data.add_(torch.randn_like(value) * 0.1)
        elif key in ("queries", "position"):
            value.data.normal_()
    for _ in range(3):  # gives BatchNorm statistics that are not its initial ones
        saae(torch.randn(4, positions, space.channels) * 2 + 0.5)
    held = None
    if memory is not None:
        # Entries among the features of frames, as fitted ones are: far from them, all would be equally near.
        probe = Detector(backbone, space, saae.eval(), "cosine")
        with torch.no_grad():
            x = torch.from_numpy(noise_frames(4, backbone.input_size, seed=99)).permute(0, 3, 1, 2)
            g = space(probe.features(x)).g.reshape(-1, space.channels)
        weight = torch.linspace(0.5, 1.5, space.channels)
        chosen = (g * weight)[torch.randperm(len(g))[:memory]]
        # Neighbours have alike radii, as fitted ones do.
        held = Memory(chosen, 1.0 + 0.2 * torch.tanh(chosen[:, 0] / chosen[:, 0].std()), weight, alpha, beta=beta)
    return Detector(backbone, space, saae.eval(), score, smoothing, held)


def noise_frames(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: smooth random colour fields with noise, so that frames differ in more than noise."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    frames = []
    for _ in range(count):
        a, b, c = rng.uniform(-80, 80, (3, 3))
        field = 128 + a * rows + b * columns + c * np.sin(6 * rows * columns) + rng.normal(0, 12, (height, width, 3))
        frames.append(np.clip(np.rint(field), 0, 255).astype(np.uint8))
    return np.stack(frames)


def noise_samples(folder: Path, count: int, size: tuple[int, int]) -> list[Sample]:
    """The same frames as normal images in files, `folder`/0.png and on."""
    found = []
    for index, frame in enumerate(noise_frames(count, size)):
        Image.fromarray(frame).save(folder / f"{index}.png")
        found.append(Sample(folder / f"{index}.png", "good", None, False))
    return found
