"""The whole model from pixels to the anomaly score map A: backbone, feature space, SAAE, score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saae_runtime.errors import ConfigError

from . import gradients
from .memory import Memory, Nearest
from .saae import SAAE
from .vit import Features

__all__ = [
    "LOSSES",
    "SCORES",
    "Detector",
    "FeatureSpace",
    "Projected",
    "anomaly_score",
    "memory_score",
]

LOSSES = ("l2", "cosine")
SCORES = ("l2", "cosine", "joint", "memory")


class Projected(NamedTuple):
    """Features in the SAAE's space.

    Attributes:
        g: N x L x channels.
        residual_energy: |f_perp|^2, the energy outside the components, float32 N x L; None without components.
        energy: |f_s|^2, float32 N x L; None without components.
    """

    g: Tensor
    residual_energy: Tensor | None = None
    energy: Tensor | None = None


class FeatureSpace(nn.Module):
    """The space in which the SAAE works: g = ((f - mean) * scale) @ basis * component_scale.

    Without a basis it only standardises, and with mean 0 and scale 1 (the `paper` preset) it changes nothing. With one,
    the SAAE sees the k leading principal components, so its widest convolutions are U/k times narrower. The energy
    outside them, |f_s - basis basis^T f_s|^2, enters the score. It is computed from the residual, because
    |f_s|^2 - |basis^T f_s|^2 is a small difference of large sums and loses its digits in bf16.

    Args:
        mean, scale: float32, U.
        basis: float32, U x k with orthonormal columns, or None.
        component_scale: float32, k, or None for ones.
    """

    def __init__(
        self, mean: Tensor, scale: Tensor, basis: Tensor | None = None, component_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())
        self.register_buffer("basis", None if basis is None else basis.float())
        if basis is not None and component_scale is None:
            component_scale = torch.ones(basis.shape[1])
        self.register_buffer("component_scale", None if component_scale is None else component_scale.float())
        self.mean: Tensor
        self.scale: Tensor
        self.basis: Tensor | None
        self.component_scale: Tensor | None

    @property
    def channels(self) -> int:
        """Channels of g: k, or U without a basis."""
        return int(self.mean.shape[0] if self.basis is None else self.basis.shape[1])

    def forward(self, f: Tensor) -> Projected:
        """f: N x L x U -> float32, see `Projected`."""
        standard = (f.float() - self.mean) * self.scale
        if self.basis is None or self.component_scale is None:
            return Projected(standard)
        inside = standard @ self.basis
        residual_energy = (standard - inside @ self.basis.T).square().sum(dim=2)
        return Projected(inside * self.component_scale, residual_energy, standard.square().sum(dim=2))


def anomaly_score(projected: Projected, g_hat: Tensor, kind: str, memory: Memory | None = None) -> Tensor:
    """Anomaly score A of every position, in float32.

    Args:
        projected: the features.
        g_hat: their reconstruction, N x L x channels.
        kind: `l2`, the norm of the residual, eq. (3), including the energy outside the components; `cosine`, one
            minus the cosine between g and g_hat, computed as half the squared distance of their directions, which is
            accurate where they nearly agree; `joint`, (1 - cos(g, g_hat))^(1/4) * (|f_perp|^2 / |f_s|)^(1/2), which is
            large where both the reconstruction error and the energy outside the components are large. The exponents
            were chosen by measuring, see docs/studies.md. `memory` is how far the patch lies from the nearest normal
            ones, relative to how far normal patches lie there, times what the autoencoder cannot explain, relative to
            the whole image's level; see `memory_score`.
        memory: for the score `memory`.

    Returns:
        float32, N x L.

    Raises:
        ConfigError: an unknown score, `joint` without components, or `memory` without a memory.
    """
    a, b = projected.g.float(), g_hat.float()
    if kind == "l2":
        squared = (a - b).square().sum(dim=2)
        if projected.residual_energy is not None:
            squared = squared + projected.residual_energy
        return squared.clamp_min(1e-12).sqrt()
    if kind not in SCORES:
        raise ConfigError(f"There is no score named {kind!r}.", "", f"one of: {', '.join(SCORES)}")
    if kind == "cosine" and b.requires_grad and not a.requires_grad:
        return gradients.cosine_distance(a, b)
    cosine = 0.5 * (_direction(a) - _direction(b)).square().sum(dim=2)
    if kind == "cosine":
        return cosine
    if kind == "memory":
        if memory is None:
            raise ConfigError("The score `memory` needs a memory of normal patches.", "", "fit with --preset fast")
        return memory_score(memory(a), cosine, memory.alpha, memory.beta)
    if projected.residual_energy is None or projected.energy is None:
        raise ConfigError(
            "The score `joint` needs components.",
            "Half of it is the energy outside them.",
            "give --components, or use --score cosine",
        )
    residual = projected.residual_energy / projected.energy.clamp_min(1e-12).sqrt()
    return (cosine.clamp_min(1e-12).sqrt() * residual).clamp_min(1e-12).sqrt()


def memory_score(
    nearest: Nearest, cosine: Tensor | None, alpha: Tensor | float, beta: Tensor | float | None = None
) -> Tensor:
    """The score `memory`, A = a / mean(a)^beta with a = d / sqrt(r) * (1 - cos)^alpha.

    The mean is over the image. Light, focus and pose raise or lower a everywhere, and say nothing about a defect.

    Args:
        nearest: d and r, each float32 N x L.
        cosine: 1 - cos(g, g_hat), float32 N x L; None: no autoencoder, its factor is 1.
        alpha: exponent, fitted so that the second factor's spread over normal patches is a fixed share of the first's
            (`saae_train.fitting.memory.balance`).
        beta: exponent of the level (`saae_train.fitting.memory.level_exponent`); None for 0.

    Returns:
        float32, N x L.
    """
    score = nearest.distance * nearest.radius.rsqrt()
    if cosine is not None:
        score = score * cosine.clamp_min(1e-12).pow(alpha)
    return score if beta is None else score * score.mean(dim=1, keepdim=True).clamp_min(1e-12).pow(-beta)


def _direction(g: Tensor) -> Tensor:
    return g * g.square().sum(dim=2, keepdim=True).clamp_min(1e-12).rsqrt()


class Detector(nn.Module):
    """Pixels to the anomaly score map; the PyTorch reference that every artefact is compared with.

    Attributes:
        backbone: frozen features.
        space: where the SAAE works.
        saae: the autoencoder.
        score: `l2`, `cosine`, `joint` or `memory`, see `anomaly_score`.
        memory: the normal patches that the score `memory` needs; None with another score.
        smoothing: standard deviation, in patches, of the Gaussian that the map is smoothed with; 0 = none (paper).
    """

    def __init__(
        self,
        backbone: Features,
        space: FeatureSpace,
        saae: SAAE,
        score: str = "l2",
        smoothing: float = 0.0,
        memory: Memory | None = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ConfigError(f"There is no score named {score!r}.", "", f"one of: {', '.join(SCORES)}")
        if (memory is not None) != (score == "memory"):
            raise ConfigError("The score `memory` and a memory of normal patches go together.", "", "fit again")
        self.backbone = backbone
        self.space = space
        self.saae = saae
        self.memory = memory
        self.score = score
        self.smoothing = smoothing
        pixel = torch.tensor([backbone.mean, backbone.std]).view(2, 1, 3, 1, 1)
        self.register_buffer("pixel_mean", pixel[0] * 255.0, persistent=False)
        self.register_buffer("pixel_std", pixel[1] * 255.0, persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        """x: float or uint8, N x 3 x H x W, RGB in 0..255, of the model's input size -> f: N x L x U."""
        return self.backbone((x.float() - self.pixel_mean) / self.pixel_std)

    def score_features(self, f: Tensor) -> Tensor:
        """f: N x L x U -> A: float32 N x L (not smoothed)."""
        projected = self.space(f)
        return anomaly_score(projected, self.saae(projected.g), self.score, self.memory)

    def forward(self, x: Tensor) -> Tensor:
        """x: float or uint8, N x 3 x H x W, RGB in 0..255 -> A: float32 N x h x w (not smoothed)."""
        height, width = self.backbone.grid
        return self.score_features(self.features(x)).unflatten(1, (height, width))
