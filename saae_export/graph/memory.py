"""The exported form of the memory: one product chooses candidates, gathered residuals give their distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saae_train.model.memory import CANDIDATES, Memory, Nearest, compare

from .fold import make_linear
from .vit import cast

__all__ = ["GraphMemory"]

GROUP = 8
"""Entries in a group of the search, one from each eighth of the memory."""

_FAR = 1e9


class GraphMemory(nn.Module):
    """g, N x L x k of the graph's type -> distance and radius, FP32 N x L; see `saae_train.model.memory.Memory`.

    The product with all entries is FP32 in an FP16 graph, too: distances are small differences of large numbers, and
    FP16 could not distinguish neighbours in a uniform region. It proposes a few more candidates than are used, so that
    a library that computes it less exactly still finds the nearest ones.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        entries, weight = memory.entries.double(), memory.weight.double()
        self.candidates, self.search = min(CANDIDATES, len(memory)), memory.search
        some = slice(self.search)
        # Groups of equal size: the last entry is repeated, so far away that it is never near.
        self.per_group = math.ceil(len(memory) / GROUP)
        repeated = GROUP * self.per_group - len(memory)
        searched = torch.cat([entries, entries[-1:].expand(repeated, -1)])[:, some]
        far = torch.full((repeated,), _FAR, dtype=torch.float64)
        energy = torch.cat([0.5 * entries[:, some].square().sum(dim=1), far])
        # z.e = (g * weight).e = g.(weight * e): the components' weights are in the product.
        self.closeness = make_linear(searched * weight[some], None)
        self.register_buffer("half_energy", energy.float())
        self.register_buffer("first_of", self.per_group * torch.arange(GROUP)[:, None])
        self.register_buffer("entries", memory.entries.clone())
        self.register_buffer("weight", memory.weight.clone())
        self.register_buffer("radius", memory.radius.clone())
        self.register_buffer("alpha", memory.alpha.clone())
        self.register_buffer("beta", memory.beta.clone() if float(memory.beta) else None)
        self.half_energy: Tensor
        self.entries: Tensor
        self.weight: Tensor
        self.radius: Tensor
        self.alpha: Tensor
        self.beta: Tensor | None
        self.first_of: Tensor

    def forward(self, g: Tensor) -> Nearest:
        g = cast(g, torch.float32)
        chosen = self._nearest(self.closeness(g[..., : self.search]) - self.half_energy)
        return compare(g * self.weight, self.entries[chosen], self.radius[chosen])

    def _nearest(self, closeness: Tensor) -> Tensor:
        """The candidates of each patch, N x L x B -> int64 N x L x M.

        Sorting all entries of all positions takes longer than their product. The nearest M lie in the M groups whose
        best is nearest, so those groups are found first; the answer is the same.
        """
        if self.per_group < self.candidates:
            return closeness.topk(self.candidates, dim=2).indices
        groups = closeness.unflatten(2, (GROUP, self.per_group))
        best = groups.amax(dim=2).topk(self.candidates, dim=2).indices.unsqueeze(2)
        members = groups.gather(3, best.expand(-1, -1, GROUP, -1)).flatten(2)
        entries = (best + self.first_of).flatten(2)
        return entries.gather(2, members.topk(self.candidates, dim=2).indices)
