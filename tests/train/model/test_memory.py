"""The memory of normal patches against a search through all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_train.model.memory import CANDIDATES, KERNEL, NEIGHBOURS, Memory


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_equals_a_search_through_all(entries: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    held = generator.normal(size=(entries, width))
    radius = generator.uniform(0.5, 2.0, entries)
    weight = generator.uniform(0.5, 2.0, width)
    g = generator.normal(size=(2, 5, width))
    memory = Memory(*(torch.tensor(array) for array in (held, radius, weight)))
    found = memory(torch.tensor(g))
    for image, patches in enumerate(g):
        for position, patch in enumerate(patches * weight):
            squared = ((held - patch) ** 2).sum(axis=1)
            near = np.argsort(squared)[:NEIGHBOURS]
            excess = squared[near] - squared.min()
            kernel = np.exp(-excess / (KERNEL * squared.min())) * np.sqrt(
                np.maximum(1 - excess / (excess.max() + 1e-9), 0)
            )
            kernel /= kernel.sum()
            far = np.linalg.norm(patch - kernel @ held[near])
            np.testing.assert_allclose(found.distance[image, position], far, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found.radius[image, position], kernel @ radius[near], rtol=1e-3)


def test_leading_components_choose_candidates_and_all_components_measure() -> None:
    generator = torch.Generator().manual_seed(5)
    held = torch.randn(200, 12, generator=generator)
    z = torch.randn(1, 7, 12, generator=generator)
    memory = Memory(held, torch.rand(200, generator=generator) + 1, torch.ones(12), search=5)
    candidates = (z[0, :, None, :5] - held[None, :, :5]).norm(dim=2).argsort(dim=1)[:, :CANDIDATES]
    torch.testing.assert_close(memory.choose(z)[0], candidates)
    found = memory(z)
    for position, among in enumerate(candidates):
        alone = Memory(held[among], memory.radius[among], memory.weight)(z[:, position : position + 1])
        torch.testing.assert_close(found.distance[0, position], alone.distance[0, 0])
        torch.testing.assert_close(found.radius[0, position], alone.radius[0, 0])
    everything = Memory(held, memory.radius, memory.weight)(z)
    assert not torch.equal(found.distance, everything.distance)


def test_which_of_two_equally_near_entries_is_the_last_does_not_matter() -> None:
    """Otherwise another library's rounding would move the map by a step."""
    generator = torch.Generator().manual_seed(2)
    held = torch.randn(NEIGHBOURS + 6, 8, generator=generator)
    z = torch.zeros(1, 1, 8)
    order = held.square().sum(dim=1).argsort()
    last, next_one = order[NEIGHBOURS - 1], order[NEIGHBOURS]
    found = []
    for nudge in (1 - 1e-6, 1 + 1e-6):
        moved = held.clone()
        moved[next_one] *= nudge * held[last].norm() / held[next_one].norm()
        found.append(float(Memory(moved, torch.ones(len(held)), torch.ones(8))(z).distance))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_what_is_left_out_does_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    held, g = torch.randn(30, 8, generator=generator), torch.randn(1, 6, 8, generator=generator)
    radius, weight = torch.rand(30, generator=generator) + 1, torch.ones(8)
    own = torch.arange(30) % 3 == 0
    found = Memory(held, radius, weight)(g, own)
    without = Memory(held[~own], radius[~own], weight)(g)
    torch.testing.assert_close(found.distance, without.distance)
    torch.testing.assert_close(found.radius, without.radius)


def test_an_entry_lies_at_no_distance_from_itself() -> None:
    """Written as a difference of squares, the distance of an entry to itself would be rounding noise."""
    generator = torch.Generator().manual_seed(0)
    held = 100 + torch.randn(50, 30, generator=generator)
    found = Memory(held, torch.ones(50), torch.ones(30))(held[None])
    assert float(found.distance.max()) <= 2e-6
