"""The exported form of the memory: one product chooses candidates, gathered residuals give their distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saae_train.model.memory import CANDIDATES, Memory, Nearest, compare

from .fold import make_linear
from .vit import cast

__all__ = ["GraphMemory"]


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
        self.alpha = float(memory.alpha)
        # z.e = (g * weight).e = g.(weight * e): the components' weights are in the product.
        self.closeness = make_linear(entries[:, some] * weight[some], None)
        self.register_buffer("half_energy", 0.5 * memory.entries[:, some].square().sum(dim=1))
        self.register_buffer("entries", memory.entries.clone())
        self.register_buffer("weight", memory.weight.clone())
        self.register_buffer("radius", memory.radius.clone())
        self.half_energy: Tensor
        self.entries: Tensor
        self.weight: Tensor
        self.radius: Tensor

    def forward(self, g: Tensor) -> Nearest:
        g = cast(g, torch.float32)
        chosen = (self.closeness(g[..., : self.search]) - self.half_energy).topk(self.candidates, dim=2).indices
        return compare(g * self.weight, self.entries[chosen], self.radius[chosen])
