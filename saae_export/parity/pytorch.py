"""The PyTorch side of parity: the fitted Detector in FP32, without folding."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from saae_runtime.bundle import Bundle
from saae_runtime.errors import CheckpointError
from saae_runtime.geometry import resize_frames
from saae_runtime.reference import ReferenceFrame
from saae_train.model.detector import Detector
from saae_train.model.scorer import TorchScorer

__all__ = ["TorchReference", "load_reference"]


class TorchReference(TorchScorer):
    """Scores frames with the Detector itself, resized to one graph's frame size.

    Args:
        detector: the fitted model.
        frame_size: (H, W) of the graph.
    """

    frame_size: tuple[int, int]

    def __init__(self, detector: Detector, frame_size: tuple[int, int]) -> None:
        super().__init__(detector, frame_size)

    def stored(self, name: str, frame: NDArray[np.uint8]) -> ReferenceFrame:
        """A frame at the graph's size with this reference's results, to store in a bundle."""
        resized = resize_frames(frame, self.frame_size)
        found = self(resized)
        return ReferenceFrame(name, resized, found.anomaly_map, found.score)


def load_reference(bundle: Bundle, checkpoint: str | os.PathLike[str]) -> TorchReference:
    """The reference for a bundle from the checkpoint it was built from.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or another model was built into the bundle.
    """
    from saae_train.model.checkpoint import load_checkpoint

    detector = load_checkpoint(checkpoint).detector
    manifest = bundle.manifest
    found = (detector.backbone.name, tuple(detector.backbone.layers), detector.saae.latent)
    expected = (manifest.backbone.name, tuple(manifest.model.layers), manifest.model.latent_dim)
    if found != expected or detector.backbone.weights.sha256 != manifest.backbone.weights_sha256:
        raise CheckpointError(
            f"{checkpoint} is not what {bundle.path} was built from.",
            f"It holds {found}; the bundle has {expected}.",
            "give the checkpoint of that build, or leave --checkpoint out",
        )
    return TorchReference(detector, (manifest.frame.height, manifest.frame.width))
