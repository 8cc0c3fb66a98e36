"""The self-attention autoencoder (paper section 3.2, Table 1, Fig. 2).

Yang, "Self-Attention Autoencoder for Anomaly Segmentation", Preprints 2021. Symbols as there: U stacked channels,
V latent width, L = h*w positions; f is the stacked feature map and f_hat its reconstruction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from saae_runtime.errors import ConfigError

from . import gradients

__all__ = ["HEADS", "SAAE", "check_shape", "from_patches", "latent_width", "to_patches"]

HEADS = 3


class Linear(nn.Linear):
    """A linear layer with faster gradients when trained on a CPU in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """... x I -> ... x O."""
        if _trains_in_bf16(x):
            return gradients.linear(x, self.weight, self.bias)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head attention: queries from one sequence, keys and values from another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.project = Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: N x L x E, memory: N x M x E -> N x L x E."""
        n, length, width = x.shape
        split = (self.heads, width // self.heads)
        query, key_value = self.query(x), self.key_value(memory)
        if _trains_in_bf16(x):
            return self.project(gradients.attention(query, key_value, self.heads))
        query = query.unflatten(2, split).transpose(1, 2)
        key, value = key_value.unflatten(2, (2, *split)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(n, length, width))


def _trains_in_bf16(x: Tensor) -> bool:
    """Whether to use `gradients`, which is faster for training on a CPU under autocast to bfloat16."""
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    return autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))


class TransformerEncoder(nn.Module):
    """One pre-norm ViT block with a final norm (the paper: "almost the same as ViT")."""

    def __init__(self, width: int, heads: int, mlp_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """N x L x E -> N x L x E."""
        y = self.norm1(x)
        x = x + self.attention(y, y)
        x = x + self.mlp(self.norm2(x))
        return self.norm(x)


class TransformerDecoder(nn.Module):
    """One pre-norm decoder block: self-attention of the queries, attention to the encoder's output, MLP."""

    def __init__(self, width: int, heads: int, mlp_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """x: queries 1 x L x E, memory: N x L x E (its position is added to the keys' side) -> N x L x E.

        Self-attention of the queries does not depend on the frame, so it is computed once for the batch.
        """
        y = self.norm1(x)
        x = x + self.self_attention(y, y)
        queries = self.norm2(x).expand(memory.shape[0], -1, -1)
        x = x + self.cross_attention(queries, memory + position)
        x = x + self.mlp(self.norm3(x))
        return self.norm(x)


class PointwiseCoder(nn.Module):
    """Three 1 x 1 convolution units over channels-last features; BatchNorm and ReLU on the first two (Table 1)."""

    def __init__(self, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        # A 1 x 1 convolution over channels-last tokens is a linear layer: no transposes in the exported graph.
        self.convs = nn.ModuleList([Linear(a, b) for a, b in itertools.pairwise(channels)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for width in channels[1:3]])

    def forward(self, x: Tensor) -> Tensor:
        """N x L x C_in -> N x L x C_out."""
        n, length, _ = x.shape
        for conv, norm in zip(self.convs, self.norms, strict=False):
            y = conv(x)
            x = functional.relu(norm(y.reshape(n * length, -1)).reshape(n, length, -1))
        return self.convs[2](x)


def to_patches(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Positions as flattened 2D patches (paper section 3.2): N x h*w x C -> N x (h*w/p^2) x (p^2*C)."""
    (height, width), channels = grid, x.shape[2]
    split = x.reshape(-1, height // patch, patch, width // patch, patch, channels)
    return split.transpose(2, 3).reshape(-1, height * width // patch**2, patch**2 * channels)


def from_patches(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `to_patches`: N x (h*w/p^2) x (p^2*C) -> N x h*w x C."""
    (height, width), channels = grid, x.shape[2] // patch**2
    split = x.reshape(-1, height // patch, width // patch, patch, patch, channels)
    return split.transpose(2, 3).reshape(-1, height * width, channels)


def check_shape(latent: int | None, grid: Sequence[int] | None, patch: int, heads: int = HEADS) -> None:
    """Check the configuration of an SAAE before a fit.

    Args:
        latent: V, or None if it is not known yet.
        grid: (h, w), needed for a patch above 1.
        patch: the SAAE's patch size p, in positions of the grid.
        heads: attention heads.

    Raises:
        ConfigError: V is not a multiple of the heads, or the patch does not divide the grid.
    """
    if latent is not None and (latent < heads or latent % heads):
        raise ConfigError(
            f"A latent width of {latent} is not possible.",
            f"It must be a multiple of the {heads} attention heads.",
            f"use --latent {max(heads, round(latent / heads) * heads)}",
        )
    if patch != 1 and (grid is None or patch < 1 or any(side % patch for side in grid)):
        shape = "x".join(map(str, grid or ())) or "unknown"
        raise ConfigError(
            f"The autoencoder cannot take patches of {patch} x {patch} positions.",
            f"They do not divide the grid of the features, {shape}.",
            f"use --saae-patch {math.gcd(patch, *grid) if grid and patch > 0 else 1}, or another --input-size",
        )


class SAAE(nn.Module):
    """The self-attention autoencoder; without its transformer it is the CAE of the paper's ablation (Table 4).

    Args:
        channels: U, channels of the features that go in and come out.
        latent: V, a multiple of `heads`; the transformer's width E equals V.
        positions: L = h * w.
        mlp_size: hidden width of the transformer's MLP; the paper has V for textures, 2V for objects.
        heads: attention heads.
        transformer: False gives the CAE.
        grid: (h, w); needed only for a patch above 1.
        patch: p, the side in positions of the patches that the transformer sees (paper: 1; with VGG19 8, section 4.3).
            Its width stays V, so a projection of p*p*V channels to V stands before it and the inverse behind it.

    Raises:
        ConfigError: V is not a multiple of the heads, or the patch does not divide the grid.
    """

    def __init__(
        self,
        channels: int,
        latent: int,
        positions: int,
        mlp_size: int | None = None,
        heads: int = HEADS,
        transformer: bool = True,
        grid: Sequence[int] | None = None,
        patch: int = 1,
    ) -> None:
        super().__init__()
        patch = patch if transformer else 1
        check_shape(latent, grid, patch, heads)
        middle = (channels + 2 * latent) // 2
        self.channels, self.latent, self.positions = channels, latent, positions
        self.encoder = PointwiseCoder((channels, middle, 2 * latent, latent))
        self.decoder = PointwiseCoder((latent, 2 * latent, middle, channels))
        self.transformer = transformer
        self.grid = (1, positions) if grid is None else (int(grid[0]), int(grid[1]))
        self.patch = patch
        self.tokens = tokens = positions // patch**2
        self.mlp_size = hidden = mlp_size or 2 * latent
        if transformer:
            self.embed = Linear(patch**2 * latent, latent)
            self.position = nn.Parameter(torch.empty(1, tokens, latent))
            self.queries = nn.Parameter(torch.empty(1, tokens, latent))
            self.transformer_encoder = TransformerEncoder(latent, heads, hidden)
            self.transformer_decoder = TransformerDecoder(latent, heads, hidden)
            self.project = Linear(latent, patch**2 * latent)
            nn.init.trunc_normal_(self.position, std=0.02)
            nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, f: Tensor) -> Tensor:
        """Reconstruct the features.

        Args:
            f: N x L x U.

        Returns:
            f_hat: N x L x U.
        """
        g = self.encoder(f)
        if self.transformer:
            if self.patch > 1:
                g = to_patches(g, self.grid, self.patch)
            memory = self.transformer_encoder(self.embed(g) + self.position)
            queries = self.queries + self.position
            g = self.project(self.transformer_decoder(queries, memory, self.position))
            if self.patch > 1:
                g = from_patches(g, self.grid, self.patch)
        return self.decoder(g)


def latent_width(eigenvalues: Tensor, keep: float = 0.8, heads: int = HEADS) -> int:
    """V: the fewest principal components that keep `keep` of the variance, rounded up to a multiple of the heads.

    Args:
        eigenvalues: float, of the training features' covariance, any order.
        keep: share of the variance, 0..1 (the paper: 0.8, section 4.1.2).
        heads: attention heads.
    """
    descending = eigenvalues.double().clamp_min(0).sort(descending=True).values
    share = descending.cumsum(0) / descending.sum()
    count = int((share < keep).sum().item()) + 1
    return -(-count // heads) * heads
