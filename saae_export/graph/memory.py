"""The memory of normal patches as it is exported: one product chooses, a gathered residual measures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saae_train.model.memory import NEIGHBOURS, Memory, Nearest, compare

from .fold import make_linear
from .vit import cast

__all__ = ["GraphMemory"]


class GraphMemory(nn.Module):
    """g, N x L x k of the graph's type -> distance and radius, FP32 N x L; see `saae_train.model.memory.Memory`.

    The product with all entries is of type `dtype`: it only chooses the nearest ones, and a neighbour that lies as near
    serves as well. Distances are sums of residuals, in FP32.
    """

    def __init__(self, memory: Memory, dtype: torch.dtype) -> None:
        super().__init__()
        entries, weight = memory.entries.double(), memory.weight.double()
        self.neighbours = min(NEIGHBOURS, len(memory))
        self.dtype = dtype
        self.alpha = float(memory.alpha)
        # z.e = (g * weight).e = g.(weight * e): the components' weights are in the product.
        self.closeness = make_linear(entries * weight, None).to(dtype)
        self.register_buffer("half_energy", 0.5 * memory.entries.square().sum(dim=1))
        self.register_buffer("entries", memory.entries.clone())
        self.register_buffer("weight", memory.weight.clone())
        self.register_buffer("radius", memory.radius.clone())
        self.half_energy: Tensor
        self.entries: Tensor
        self.weight: Tensor
        self.radius: Tensor

    def forward(self, g: Tensor) -> Nearest:
        closeness = cast(self.closeness(cast(g, self.dtype)), torch.float32) - self.half_energy
        chosen = closeness.topk(self.neighbours, dim=2).indices
        return compare(cast(g, torch.float32) * self.weight, self.entries[chosen], self.radius[chosen])
