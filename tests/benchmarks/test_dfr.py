"""The DFR baseline is the preset `dfr` in the shapes that the paper gives it, with the fused graph's outputs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.dfr import INPUT, dfr
from benchmarks.torch_variants import Deployed
from saae_train.model.vgg import VGGFeatures


@pytest.fixture(scope="module")
def module() -> Deployed:
    return dfr(latent=24)


def test_it_is_the_papers(module: Deployed) -> None:
    """Section 4.3: 256 x 256 pixels, 64 x 64 x 3456 features; 4.4.2: f1:12 and an autoencoder of convolutions."""
    backbone, saae = module.detector.backbone, module.detector.saae
    assert isinstance(backbone, VGGFeatures)
    assert backbone.layers == tuple(range(1, 13))
    assert (backbone.input_size, backbone.grid, backbone.channels) == (INPUT, (64, 64), 3456)
    assert INPUT == (256, 256)
    assert not saae.transformer
    assert (saae.channels, saae.latent) == (3456, 24)
    assert module.detector.space.basis is None
    assert module.detector.score == "l2"
    assert "random" in backbone.weights.source


def test_outputs_are_the_graphs(module: Deployed) -> None:
    frames = torch.randint(0, 256, (1, *INPUT, 3), dtype=torch.uint8)
    with torch.no_grad():
        anomaly_map, score, mask = module(frames, torch.zeros(1))
        high = module(frames, score)[2]
    assert anomaly_map.shape == mask.shape == (1, *INPUT)
    assert float(score) == float(anomaly_map.max())
    assert mask.dtype == torch.uint8
    assert bool(mask.all())
    assert not bool(high.any())
