"""The DFR baseline has the shapes that the paper gives it, and its parts compute what they are said to."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra `train`")
pytest.importorskip("torchvision", reason="needs torchvision")

import torch
from torch.nn import functional

from benchmarks.dfr import CHANNELS, DFR, GRID, INPUT, _align


@pytest.fixture(scope="module")
def dfr() -> DFR:
    return DFR(latent=24)


def test_features_are_twelve_aligned_maps(dfr: DFR) -> None:
    convolutions = [layer for layer in dfr.vgg if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, *[256] * 4, *[512] * 4]
    assert sum(layer.out_channels for layer in convolutions) == CHANNELS
    x = torch.rand(1, 3, *INPUT) * 255
    with torch.no_grad():
        f = dfr.features(x)
        first = functional.relu(convolutions[0]((x - dfr.mean) / dfr.std))
    assert f.shape == (1, CHANNELS, *GRID)
    torch.testing.assert_close(f[:, :64], functional.avg_pool2d(first, 4))


def test_alignment_keeps_a_plane_a_plane() -> None:
    for side in (32, 64, 128, 256):
        ramp = ((torch.arange(side) + 0.5) / side).expand(1, 2, side, side)
        aligned = _align(ramp)
        assert aligned.shape == (1, 2, *GRID)
        expected = (torch.arange(GRID[1]) + 0.5) / GRID[1]
        inside = slice(2, -2)  # an upsample repeats the border
        torch.testing.assert_close(aligned[0, 0, 5, inside], expected[inside])


def test_outputs_are_the_graphs(dfr: DFR) -> None:
    frames = torch.randint(0, 256, (1, *INPUT, 3), dtype=torch.uint8)
    with torch.no_grad():
        anomaly_map, score, mask = dfr(frames, torch.zeros(1))
        high = dfr(frames, score)[2]
    assert anomaly_map.shape == mask.shape == (1, *INPUT)
    assert float(score) == float(anomaly_map.max())
    assert mask.dtype == torch.uint8
    assert bool(mask.all())
    assert not bool(high.any())
