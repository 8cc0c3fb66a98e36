"""Both ends of the fused graph: camera frame to model pixels, and patch scores to a map at the frame's size.

Resize and upsample are pairs of constant matrices from `saae_runtime.geometry`, so training, graph and runtime compute
the same. TensorRT's parser refuses an ONNX Resize with antialias, and OpenVINO ignores it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from saae_runtime.geometry import gaussian_matrix, resize_matrix, upsample_matrix

__all__ = ["FrameToPixels", "ScoresToMap"]


class FrameToPixels(nn.Module):
    """uint8 N x H x W x 3 -> float32 N x h x w x 3 in 0..255, resized as Pillow's antialiased BILINEAR does it.

    The cast comes first: TensorRT accepts uint8 only as an input that is cast immediately.

    Args:
        frame_size: (H, W).
        model_size: (h, w).
    """

    def __init__(self, frame_size: tuple[int, int], model_size: tuple[int, int]) -> None:
        super().__init__()
        rows = None if frame_size[0] == model_size[0] else resize_matrix(frame_size[0], model_size[0])
        columns = None if frame_size[1] == model_size[1] else resize_matrix(frame_size[1], model_size[1]).T
        (high, wide), (low, narrow) = frame_size, model_size
        # The two products in the cheaper order.
        self.rows_first = low * high * wide + low * wide * narrow <= high * wide * narrow + low * high * narrow
        self.register_buffer("rows", _tensor(rows))
        self.register_buffer("columns", _tensor(columns))
        self.rows: Tensor | None
        self.columns: Tensor | None

    def forward(self, frame: Tensor) -> Tensor:
        x = frame.to(torch.float32)
        if self.rows is not None and self.rows_first:  # along the height, channels and width are one axis
            x = torch.matmul(self.rows, x.flatten(2)).unflatten(2, (-1, 3))
        if self.columns is not None:
            x = torch.matmul(x.permute(0, 3, 1, 2), self.columns).permute(0, 2, 3, 1)
        if self.rows is not None and not self.rows_first:
            x = torch.matmul(self.rows, x.flatten(2)).unflatten(2, (-1, 3))
        return x


class ScoresToMap(nn.Module):
    """Patch scores A float32 N x h x w -> anomaly map float32 N x H x W (paper section 3.3).

    Bilinear, align_corners=False; an optional Gaussian over the patch scores is multiplied into the same two matrices.

    Args:
        grid: (h, w).
        frame_size: (H, W).
        sigma: standard deviation of the Gaussian in patches; 0 for none.
    """

    def __init__(self, grid: tuple[int, int], frame_size: tuple[int, int], sigma: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rows", _tensor(_smoothed(grid[0], frame_size[0], sigma)))
        self.register_buffer("columns", _tensor(_smoothed(grid[1], frame_size[1], sigma).T))
        self.rows: Tensor
        self.columns: Tensor

    def forward(self, scores: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(self.rows, scores), self.columns)


def _smoothed(n_in: int, n_out: int, sigma: float) -> np.ndarray:
    upsample = upsample_matrix(n_in, n_out)
    if sigma == 0:
        return upsample
    return (upsample.astype(np.float64) @ gaussian_matrix(n_in, sigma).astype(np.float64)).astype(np.float32)


def _tensor(matrix: np.ndarray | None) -> Tensor | None:
    return None if matrix is None else torch.tensor(np.ascontiguousarray(matrix))
