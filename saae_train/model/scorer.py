"""Scores camera frames with a fitted Detector: resize, score, smooth, upsample, in FP32 and without folding."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saae_runtime.geometry import gaussian_matrix, resize_frames, resize_matrix, upsample_map
from saae_runtime.result import Scored

from .detector import Detector

__all__ = ["TorchScorer"]


class TorchScorer:
    """Scores frames with the Detector itself (paper section 3.3); a `saae_runtime.result.Scorer`.

    Same steps as a deployed graph: host resize to the graph's frame size, resize to the model's size,
    map at the frame's size with torch's own interpolation. The score is the largest value of the map.

    Args:
        detector: the fitted model; it is moved to `device`.
        frame_size: (H, W) of the graph; None: every frame at its own size, as in a graph made for that size.
        device: torch device.
    """

    def __init__(
        self,
        detector: Detector,
        frame_size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.detector = detector.eval().to(self.device)
        self.frame_size = frame_size
        height, width = detector.backbone.grid
        self._smooth_rows = torch.tensor(gaussian_matrix(height, detector.smoothing)).to(self.device)
        self._smooth_columns = torch.tensor(gaussian_matrix(width, detector.smoothing)).T.to(self.device)
        # If images differ in size, the matrices would be rebuilt for each.
        self._resize = lru_cache(maxsize=128)(self._matrix)

    @torch.no_grad()
    def __call__(self, frame: NDArray[np.uint8]) -> Scored:
        """Score one frame, uint8 H x W x 3. The score is the map's largest value at the graph's frame size."""
        own = (int(frame.shape[0]), int(frame.shape[1]))
        size = self.frame_size or own
        pixels = torch.tensor(resize_frames(frame, size)).permute(2, 0, 1)[None].to(self.device).float()
        model_size = self.detector.backbone.input_size
        if size != model_size:
            pixels = self._resize(size[0], model_size[0]) @ pixels @ self._resize(size[1], model_size[1]).T
        scores = self._smooth_rows @ self.detector(pixels) @ self._smooth_columns
        full = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)[0, 0]
        return Scored(float(full.max()), upsample_map(full.cpu().numpy(), own))

    def _matrix(self, n_in: int, n_out: int) -> Tensor:
        return torch.tensor(resize_matrix(n_in, n_out)).to(self.device)
