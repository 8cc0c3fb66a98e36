"""The memory of normal patches: how far a patch lies from the nearest ones, and how far normal patches lie there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NEIGHBOURS", "Memory", "Nearest"]

NEIGHBOURS = 3
"""Entries whose radii are averaged at a position."""


class Nearest(NamedTuple):
    """What the memory says of every position.

    Attributes:
        distance: d, to the nearest entry, float32 N x L.
        radius: r, what d is for normal images there: the mean radius of the nearest entries, float32 N x L.
    """

    distance: Tensor
    radius: Tensor


class Memory(nn.Module):
    """Normal patches z = g * weight, chosen to cover all that were seen (PatchCore, Roth et al. 2022, section 3.2).

    Args:
        entries: B x k, normal patches.
        radius: B, the distance at which normal patches of other images lie from an entry.
        weight: k, of each component.
    """

    def __init__(self, entries: Tensor, radius: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("entries", entries.float())
        self.register_buffer("radius", radius.float())
        self.register_buffer("weight", weight.float())
        self.entries: Tensor
        self.radius: Tensor
        self.weight: Tensor

    def __len__(self) -> int:
        return int(self.entries.shape[0])

    def forward(self, g: Tensor) -> Nearest:
        """g: N x L x k -> distance and radius, each float32 N x L."""
        z = g.float() * self.weight
        chosen = self.choose(z)
        # As the sum of a residual, not as |z|^2 - 2 z.e + |e|^2: that is a small difference of large numbers.
        distance = (self.entries[chosen] - z[:, :, None]).square().sum(dim=3)
        return Nearest(distance.amin(dim=2).clamp_min(1e-12).sqrt(), self.radius[chosen].mean(dim=2))

    def choose(self, z: Tensor) -> Tensor:
        """The nearest entries of each patch: z, N x L x k -> int64 N x L x NEIGHBOURS."""
        closeness = z @ self.entries.T - 0.5 * self.entries.square().sum(dim=1)
        return closeness.topk(min(NEIGHBOURS, len(self)), dim=2).indices
