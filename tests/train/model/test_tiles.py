"""Tiles: every position covered once, from the window where it is most central, in PyTorch and in the graph alike."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY

from saae_runtime.errors import ConfigError
from saae_train.model.tiles import MOST_TOKENS, Tiles, tiles_for
from saae_train.model.vit import build_backbone

sides = st.integers(8, 27)
counts = st.integers(1, 4)


@settings(deadline=None)
@given(window=st.tuples(sides, sides), count=st.tuples(counts, counts), prefix=st.integers(0, 5))
def test_every_position_comes_from_the_window_where_it_is_most_central(
    window: tuple[int, int], count: tuple[int, int], prefix: int
) -> None:
    tiles = Tiles.over(window, count)
    height, width = tiles.grid
    # each position as a "pixel" that holds its own number
    numbers = torch.arange(height * width).reshape(1, 1, height, width)
    parts = tiles.cut(numbers, 1)
    assert parts.shape == (len(tiles), 1, *window)
    rows = parts.flatten(2).transpose(1, 2)
    rows = torch.cat([torch.full((len(tiles), prefix, 1), -1), rows], dim=1)
    joined = tiles.join(rows, tiles.index(prefix))
    assert joined.flatten().tolist() == list(range(height * width))
    places = torch.tensor(tiles.places())
    chosen = tiles.index() // (window[0] * window[1])
    for position in np.random.default_rng(0).integers(0, height * width, 20):
        at = torch.tensor([position // width, position % width])
        inside = ((places <= at) & (at < places + torch.tensor(window))).all(dim=1)
        off = (2 * (at - places) - (torch.tensor(window) - 1)).abs()
        best = off[inside].amin(dim=0)  # along each side by itself
        assert off[chosen[position]].tolist() == best.tolist()


@settings(deadline=None)
@given(window=st.tuples(sides, sides), count=st.tuples(counts, counts))
def test_neighbours_overlap_and_the_patch_of_the_autoencoder_divides_the_grid(
    window: tuple[int, int], count: tuple[int, int]
) -> None:
    tiles = Tiles.over(window, count)
    for axis in (0, 1):
        starts = sorted({place[axis] for place in tiles.places()})
        assert starts[0] == 0
        assert starts[-1] + window[axis] == tiles.grid[axis]
        assert all(3 <= a + window[axis] - b <= 8 for a, b in pairwise(starts))
    assert tiles.grid[0] % tiles.saae_patch == tiles.grid[1] % tiles.saae_patch == 0
    if count == (1, 1):
        assert tiles.grid == window
        assert tiles.saae_patch == 1


def test_tiles_of_the_default_keep_the_transformer_small() -> None:
    for count in ((2, 2), (2, 3), (3, 3), (3, 4), (4, 4)):
        tiles = Tiles.over((24, 24), count)
        assert tiles.grid[0] * tiles.grid[1] <= MOST_TOKENS * tiles.saae_patch**2


def test_as_many_tiles_as_the_images_want() -> None:
    assert tiles_for((336, 336), (336, 336)) == (1, 1)
    assert tiles_for((900, 900), (336, 336)) == (1, 1)
    assert tiles_for((1024, 1024), (336, 336)) == (2, 2)
    assert tiles_for((1300, 2100), (336, 336)) == (2, 3)
    assert tiles_for((9000, 500), (336, 336)) == (4, 1)


def test_the_features_of_a_tile_are_the_backbone_s_own() -> None:
    tiled = build_backbone(TINY, (0, 1), (96, 48), "random", tiles=(2, 1))
    plain = build_backbone(TINY, (0, 1), (96, 48), "random")
    patch, (height, width) = tiled.patch, tiled.grid
    assert (height, width) == (tiled.input_size[0] // patch, plain.grid[1])
    x = torch.randn(2, 3, *tiled.input_size)
    f = tiled(x).unflatten(1, (height, width))
    top = plain(x[:, :, :96]).unflatten(1, plain.grid)
    bottom = plain(x[:, :, -96:]).unflatten(1, plain.grid)
    torch.testing.assert_close(f[:, 0], top[:, 0])
    torch.testing.assert_close(f[:, -1], bottom[:, -1])
    assert not torch.allclose(top[:, -1], f[:, plain.grid[0] - 1])  # the overlap comes from the more central window


def test_vgg_takes_no_tiles() -> None:
    with pytest.raises(ConfigError, match="does not support tiles") as caught:
        build_backbone("vgg19", (1, 2), (64, 64), "random", tiles=(2, 2))
    assert "--input-size" in caught.value.cure
