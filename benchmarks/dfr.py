"""DFR with random weights: the method that the paper measures its speed against (section 4.4.2), in plain PyTorch.

It is the preset `dfr` of saae_train, VGG19 f1:12 and an autoencoder of 1 x 1 convolutions, at the sizes of the paper:
256 x 256 pixels, 64 x 64 x 3456 features. Its maps are aligned by one constant matrix per axis, with the same result as
DFR's own steps (upsampling all maps to 256 x 256, then averaging) but less work.
"""

from __future__ import annotations

from benchmarks.random_model import random_checkpoint, random_config
from benchmarks.torch_variants import Deployed
from saae_train.config import VGG_BACKBONE

__all__ = ["INPUT", "dfr"]

INPUT = (256, 256)


def dfr(latent: int = 300, seed: int = 0) -> Deployed:
    """uint8 frames N x 256 x 256 x 3, threshold -> anomaly map N x 256 x 256, score N, mask, as the fused graph.

    Args:
        latent: width of the code, V in the paper.
        seed: of the random weights.
    """
    return Deployed(random_checkpoint(random_config(VGG_BACKBONE, "dfr", latent=latent), seed).detector, INPUT)
