"""The PyTorch side of parity: the fitted Detector as it was trained, nothing folded, in FP32."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from saae_runtime.bundle import Bundle
from saae_runtime.errors import CheckpointError
from saae_runtime.geometry import gaussian_matrix, resize_frames, resize_matrix, upsample_map
from saae_train.detector import Detector

from .reference import ReferenceFrame

__all__ = ["TorchReference", "load_reference"]


class TorchReference:
    """Frame -> (anomaly map, score) with the Detector itself.

    Takes the frame's way through a deployed graph (host resize to the graph's frame size, resize to the model's size,
    map at the frame's size), with torch's own interpolation for the upsample.

    Args:
        detector: the fitted model.
        frame_size: (H, W) of the graph.
    """

    def __init__(self, detector: Detector, frame_size: tuple[int, int]) -> None:
        self.detector = detector.eval()
        self.frame_size = frame_size
        model_size = detector.backbone.input_size
        self._rows = torch.tensor(resize_matrix(frame_size[0], model_size[0]))
        self._columns = torch.tensor(resize_matrix(frame_size[1], model_size[1])).T
        height, width = detector.backbone.grid
        self._smooth_rows = torch.tensor(gaussian_matrix(height, detector.smoothing))
        self._smooth_columns = torch.tensor(gaussian_matrix(width, detector.smoothing)).T

    @torch.no_grad()
    def __call__(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
        resized = resize_frames(frame, self.frame_size)
        pixels = torch.tensor(resized).permute(2, 0, 1)[None].float()
        if self.frame_size != self.detector.backbone.input_size:
            pixels = self._rows @ pixels @ self._columns
        scores = self._smooth_rows @ self.detector(pixels) @ self._smooth_columns
        full = F.interpolate(scores[:, None], self.frame_size, mode="bilinear", align_corners=False)[0, 0]
        anomaly_map = upsample_map(full.numpy(), (frame.shape[0], frame.shape[1]))
        return anomaly_map, float(full.max())

    def stored(self, name: str, frame: NDArray[np.uint8]) -> ReferenceFrame:
        """A frame at the graph's size with this reference's answers, to be kept in a bundle."""
        resized = resize_frames(frame, self.frame_size)
        anomaly_map, score = self(resized)
        return ReferenceFrame(name, resized, anomaly_map, score)


def load_reference(bundle: Bundle, checkpoint: str | os.PathLike[str]) -> TorchReference:
    """The reference for a bundle from the checkpoint it was built from.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or another model was built into the bundle.
    """
    from saae_train.checkpoint import load_checkpoint

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
