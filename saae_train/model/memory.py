"""The memory of normal patches: how far a patch lies from the nearest ones, and how far normal patches lie there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CANDIDATES", "KERNEL", "NEIGHBOURS", "SEARCH", "Memory", "Nearest", "compare"]

NEIGHBOURS = 8
"""Entries that a patch is compared with; the last one only says where the weights end."""

SEARCH = 96
"""Leading components used to choose candidates among all entries; distances to the candidates use all components."""

CANDIDATES = 16
"""Number of candidates."""

KERNEL = 0.5
"""Width of the kernel that weights the entries, in units of the smallest squared distance."""


class Nearest(NamedTuple):
    """Distance and radius at every position.

    Attributes:
        distance: d, to the kernel-weighted mean of the nearest entries, float32 N x L.
        radius: r, what d is for normal images there: the weighted mean of the entries' radii, float32 N x L.
    """

    distance: Tensor
    radius: Tensor


class Memory(nn.Module):
    """Normal patches z = g * weight, chosen to cover all that were seen (PatchCore, Roth et al. 2022, section 3.2).

    A patch is compared with the kernel-weighted mean of its nearest entries. So a patch between entries counts as
    normal, too, and the result does not jump if rounding adds or drops a neighbour.

    Args:
        entries: B x k, normal patches.
        radius: B, how far normal patches of other images lie from the memory near an entry.
        weight: k, of each component.
        alpha: exponent of 1 - cos(g, g_hat) in the score, see `saae_train.model.detector.memory_score`.
        beta: exponent of the image's own level there.
        search: leading components that candidates are chosen by; None: all.
    """

    def __init__(
        self,
        entries: Tensor,
        radius: Tensor,
        weight: Tensor,
        alpha: float = 0.0,
        search: int | None = None,
        beta: float = 0.0,
    ) -> None:
        super().__init__()
        width = int(entries.shape[1])
        self.search = width if search is None else min(search, width)
        self.register_buffer("entries", entries.float())
        self.register_buffer("radius", radius.float())
        self.register_buffer("weight", weight.float())
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.entries: Tensor
        self.radius: Tensor
        self.weight: Tensor
        self.alpha: Tensor
        self.beta: Tensor

    def __len__(self) -> int:
        return int(self.entries.shape[0])

    def forward(self, g: Tensor, left_out: Tensor | None = None) -> Nearest:
        """d and r of patches.

        Args:
            g: N x L x k.
            left_out: bool B, entries to leave out.

        Returns:
            Each float32 N x L.
        """
        z = g.float() * self.weight
        chosen = self.choose(z, left_out)
        return compare(z, self.entries[chosen], self.radius[chosen])

    def choose(self, z: Tensor, left_out: Tensor | None = None, count: int = CANDIDATES) -> Tensor:
        """The nearest entries of each patch by the components of the search, nearest first.

        Args:
            z: N x L x k.
            left_out: bool B, entries that do not count.
            count: how many.

        Returns:
            int64, N x L x count, fewer where there are fewer entries.
        """
        held = self.entries[:, : self.search]
        closeness = z[..., : self.search] @ held.T - 0.5 * held.square().sum(dim=1)
        most = len(self)
        if left_out is not None:
            closeness = closeness.masked_fill(left_out, -torch.inf)
            most -= int(left_out.sum())
        return closeness.topk(min(count, most), dim=2).indices


def compare(z: Tensor, entries: Tensor, radius: Tensor) -> Nearest:
    """d and r of patches against their nearest entries.

    Distances are sums of squared residuals. |z|^2 - 2 z.e + |e|^2 would be a small difference of large numbers, too
    inaccurate in bf16.

    Args:
        z: float32 N x L x k.
        entries: their nearest entries, float32 N x L x M x k. Of more than `NEIGHBOURS` the nearest count, so that a
            search that rounds may hand on a few too many. The last one's weight is 0: where two entries are equally
            near, it does not matter which of them is the last.
        radius: of these, float32 N x L x M.
    """
    residual = entries - z.unsqueeze(2)
    squared = residual.square().sum(dim=3)
    smallest = squared.amin(dim=2, keepdim=True)
    excess = squared - smallest
    count = min(NEIGHBOURS, squared.shape[2])
    reach = excess.topk(count, dim=2, largest=False).values[..., -1:]
    weight = torch.exp(-excess / (KERNEL * smallest + 1e-9)) * (1.0 - excess / (reach + 1e-9)).clamp_min(0.0).sqrt()
    weight = weight / weight.sum(dim=2, keepdim=True).clamp_min(1e-9)
    distance = (weight.unsqueeze(3) * residual).sum(dim=2).square().sum(dim=2).clamp_min(1e-12).sqrt()
    return Nearest(distance, (weight * radius).sum(dim=2))
