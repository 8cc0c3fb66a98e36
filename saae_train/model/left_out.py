"""Anomaly scores of fitted images, each with itself left out of the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LeftOut"]


@dataclass(frozen=True)
class LeftOut:
    """Scores of the fitted images, each as if it were new.

    The memory leaves out the image and its near-copies, exactly. The autoencoder was fitted to the image; on bottles,
    screws and magnetic tiles this moved the mean log score by at most 0.03 against held-out images (docs/design.md).

    Attributes:
        scores: A of every position, not smoothed, float32 N x h x w.
        names: file names of the images, in the same order.
        reach: how far near-copies reach in the order of the images, see `saae_train.data.bursts`; 0: there are none.
        hashes: sha256 of each image's file, in the same order; empty where an earlier version wrote the checkpoint.
    """

    scores: Tensor
    names: tuple[str, ...]
    reach: int = 0
    hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scores.ndim != 3 or self.scores.dtype != torch.float32 or len(self.scores) != len(self.names):
            raise ValueError(f"{tuple(self.scores.shape)} scores of {len(self.names)} images")
        if self.hashes and len(self.hashes) != len(self.names):
            raise ValueError(f"{len(self.hashes)} hashes of {len(self.names)} images")
