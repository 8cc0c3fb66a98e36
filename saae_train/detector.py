"""The whole model from pixels to the anomaly score map A: backbone, feature space, SAAE, score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saae_runtime.errors import ConfigError

from .backbone import ViTFeatures
from .model import SAAE, SCORES

__all__ = ["Detector", "FeatureSpace", "anomaly_score"]


class FeatureSpace(nn.Module):
    """The space in which the SAAE works: g = ((f - mean) * scale) @ basis * component_scale.

    With no basis it only standardises, and with mean 0 and scale 1 (the `paper` preset) it changes nothing. With one,
    the SAAE sees the k leading principal components, which makes its widest convolutions U/k times narrower, and what
    lies outside them is not lost: its energy is exact, |f_s|^2 - |basis^T f_s|^2, and joins the score as `rest`.
    Components outside are weighed as the last one inside.

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

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor | None]:
        """f: N x L x U -> g: float32 N x L x channels, rest: float32 N x L (None without a basis)."""
        standard = (f.float() - self.mean) * self.scale
        if self.basis is None or self.component_scale is None:
            return standard, None
        inside = standard @ self.basis
        rest = (standard.square().sum(dim=2) - inside.square().sum(dim=2)).clamp_min(0.0)
        return inside * self.component_scale, rest * self.component_scale[-1].square()


def anomaly_score(g: Tensor, g_hat: Tensor, rest: Tensor | None, kind: str) -> Tensor:
    """Anomaly score A of every position, in float32.

    Args:
        g, g_hat: N x L x channels.
        rest: N x L, energy outside the components, or None.
        kind: `l2`, the norm of the residual, eq. (3); `cosine`, one minus the cosine of the angle between f and f_hat.
            The reconstruction has nothing outside the components, so `rest` adds to the residual's energy, and to
            f's own energy alone in the cosine.

    Returns:
        float32, N x L.

    Raises:
        ConfigError: no such score.
    """
    a, b = g.float(), g_hat.float()
    outside = 0.0 if rest is None else rest
    if kind == "l2":
        return ((a - b).square().sum(dim=2) + outside).clamp_min(1e-12).sqrt()
    if kind == "cosine":
        energy = (a.square().sum(dim=2) + outside) * b.square().sum(dim=2)
        return 1.0 - (a * b).sum(dim=2) / energy.clamp_min(1e-12).sqrt()
    raise ConfigError(f"There is no score named {kind!r}.", "", f"one of: {', '.join(SCORES)}")


class Detector(nn.Module):
    """Pixels to the anomaly score map; the PyTorch reference that every artefact is held against.

    Attributes:
        backbone: frozen features.
        space: where the SAAE works.
        saae: the autoencoder.
        score: `l2` or `cosine`.
        use_rest: whether the energy outside the components joins the score.
        smoothing: standard deviation, in patches, of the Gaussian that the map is smoothed with; 0 = none (paper).
    """

    def __init__(
        self,
        backbone: ViTFeatures,
        space: FeatureSpace,
        saae: SAAE,
        score: str = "l2",
        use_rest: bool = True,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ConfigError(f"There is no score named {score!r}.", "", f"one of: {', '.join(SCORES)}")
        self.backbone = backbone
        self.space = space
        self.saae = saae
        self.score = score
        self.use_rest = use_rest
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
        g, rest = self.space(f)
        return anomaly_score(g, self.saae(g), rest if self.use_rest else None, self.score)

    def forward(self, x: Tensor) -> Tensor:
        """x: float or uint8, N x 3 x H x W, RGB in 0..255 -> A: float32 N x h x w (not smoothed)."""
        height, width = self.backbone.grid
        return self.score_features(self.features(x)).unflatten(1, (height, width))
