"""The exported memory: a search by leading components is PyTorch's."""

from __future__ import annotations

import pytest
import torch

from saae_export.graph.memory import GraphMemory
from saae_train.model.memory import Memory


@pytest.mark.parametrize("search", [5, None])
def test_the_graph_chooses_and_measures_as_pytorch(search: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    entries, radius, weight = (torch.rand(shape, generator=generator) + 0.5 for shape in ((300, 12), (300,), (12,)))
    memory = Memory(torch.randn(300, 12, generator=generator) * entries, radius, weight, 0.2, search)
    g = torch.randn(2, 9, 12, generator=generator)
    expected, found = memory(g), GraphMemory(memory)(g)
    torch.testing.assert_close(found.distance, expected.distance)
    torch.testing.assert_close(found.radius, expected.radius)
    other = Memory(memory.entries, radius, weight, 0.2, 4)(g)
    assert not torch.allclose(other.distance, expected.distance)  # the width of the search is seen


@pytest.mark.parametrize("count", [9, 100, 127, 128, 129, 300, 301, 1024])
def test_groups_find_the_same_entries(count: int) -> None:
    """The number of entries is no multiple of the group's size, and some lie where the last one is repeated."""
    generator = torch.Generator().manual_seed(count)
    entries = torch.randn(count, 12, generator=generator)
    ones = torch.ones(12)
    memory = Memory(entries, torch.ones(count), ones, 0.0, 6)
    graph = GraphMemory(memory)
    g = torch.cat([torch.randn(7, 12, generator=generator), entries[-3:]])[None]
    found = graph._nearest(graph.closeness(g[..., :6]) - graph.half_energy)
    assert found.shape == (1, 10, min(16, count))
    assert int(found.max()) < count
    expected = memory.choose(g)
    torch.testing.assert_close(found.sort(dim=2).values, expected.sort(dim=2).values)
