"""The memory of normal patches against a search through all of it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_train.model.memory import NEIGHBOURS, Memory


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
    far = np.linalg.norm((g * weight)[:, :, None] - held, axis=3)
    order = np.argsort(far, axis=2)[..., :NEIGHBOURS]
    np.testing.assert_allclose(found.distance.numpy(), far.min(axis=2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.radius.numpy(), radius[order].mean(axis=2), rtol=1e-4)


def test_an_entry_lies_at_no_distance_from_itself() -> None:
    """Written as a difference of squares, the distance of an entry to itself would be rounding noise."""
    generator = torch.Generator().manual_seed(0)
    held = 100 + torch.randn(50, 30, generator=generator)
    found = Memory(held, torch.ones(50), torch.ones(30))(held[None])
    assert float(found.distance.max()) <= 2e-6
