"""Both ends of the fused graph: camera frame to model pixels, and patch scores to a map at the frame's size.

Resize and upsample are pairs of constant matrices from `saae_runtime.geometry`, so training, graph and runtime compute
the same. TensorRT's parser refuses an ONNX Resize with antialias, and OpenVINO ignores it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saae_runtime.geometry import gaussian_matrix, resize_matrix, upsample_matrix

__all__ = ["MIDDLE", "Banded", "FrameToPixels", "ScoresToMap"]

MIDDLE = 128.0
"""Subtracted from every pixel: bf16 has 8 bits, and of a bright part most would only say that it is bright."""

_COPY = 32
"""Copying one element costs as much as so many multiplications of a matrix product."""

_TRANSPOSE = 200
"""The same of an element whose axes are exchanged, as the product along the width needs it."""

_LEAST_ROWS = 24
"""Fewest rows of a block; products with fewer are slow."""


class Banded(nn.Module):
    """float32 N x n_in x F -> N x n_out x F by a matrix whose rows are zero except in a band, such as a resize.

    Each block of rows reads only the inputs that it needs: for a frame of 1024 pixels and a model of 336, that is a
    seventh of the multiplications. Three nodes whatever the number of blocks, because small ones cost time on a GPU.

    Args:
        matrix: float32 n_out x n_in.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__()
        self.cost, starts, length = _blocks(matrix)
        """Multiplications for each of the F columns, copies counted as such."""
        weights = np.stack(
            [
                block[:, start : start + length]
                for block, start in zip(np.split(matrix, len(starts)), starts, strict=True)
            ]
        )
        inputs = (starts[:, None] + np.arange(length)).ravel()
        self.register_buffer("weights", _tensor(weights if len(starts) > 1 else weights[0]))
        self.register_buffer("inputs", torch.from_numpy(inputs) if len(starts) > 1 else None)
        self.weights: Tensor
        self.inputs: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            return torch.matmul(self.weights, x)
        blocks, _, length = self.weights.shape
        x = torch.index_select(x, 1, self.inputs).unflatten(1, (blocks, length))
        return torch.matmul(self.weights, x).flatten(1, 2)


class FrameToPixels(nn.Module):
    """uint8 N x H x W x 3 -> float32 N x h x w x 3 around 0, resized as Pillow's antialiased BILINEAR does it.

    The values are pixels minus MIDDLE.

    The cast comes first: TensorRT accepts uint8 only as an input that is cast immediately.

    Args:
        frame_size: (H, W).
        model_size: (h, w).
    """

    def __init__(self, frame_size: tuple[int, int], model_size: tuple[int, int]) -> None:
        super().__init__()
        (high, wide), (low, narrow) = frame_size, model_size
        self.rows = None if high == low else Banded(resize_matrix(high, low))
        self.columns = None if wide == narrow else Banded(resize_matrix(wide, narrow))
        self.rows_first = True
        if self.rows is not None and self.columns is not None:  # the cheaper order
            narrowed = self.columns.cost + _TRANSPOSE * (wide + narrow)
            self.rows_first = self.rows.cost * wide + narrowed * low <= narrowed * high + self.rows.cost * narrow

    def forward(self, frame: Tensor) -> Tensor:
        x = frame.to(torch.float32) - MIDDLE
        if self.rows_first:
            return self._narrow(self._lower(x))
        return self._lower(self._narrow(x))

    def _lower(self, x: Tensor) -> Tensor:
        """Along the height: width and channels are one axis."""
        return x if self.rows is None else self.rows(x.flatten(2)).unflatten(2, (-1, 3))

    def _narrow(self, x: Tensor) -> Tensor:
        """Along the width: height and channels are one axis."""
        if self.columns is None:
            return x
        height = x.shape[1]
        x = self.columns(x.permute(0, 2, 1, 3).flatten(2))
        return x.unflatten(2, (height, 3)).permute(0, 2, 1, 3)


def _blocks(matrix: np.ndarray) -> tuple[int, NDArray[np.int64], int]:
    """The cheapest equal blocks of rows: (cost for each column, first input of each block, inputs of a block)."""
    n_out, n_in = matrix.shape
    used = matrix != 0.0
    first, last = used.argmax(axis=1), n_in - 1 - used[:, ::-1].argmax(axis=1)
    best = (n_out * n_in, np.zeros(1, np.int64), n_in)
    for count in range(2, n_out // _LEAST_ROWS + 1):
        if n_out % count:
            continue
        low, high = first.reshape(count, -1).min(axis=1), last.reshape(count, -1).max(axis=1)
        length = int((high - low).max()) + 1
        cost = n_out * length + _COPY * count * length
        if cost < best[0]:
            best = (cost, np.minimum(low, n_in - length), length)
    return best


class ScoresToMap(nn.Module):
    """Patch scores A float32 N x h x w -> anomaly map float32 N x H x W (paper section 3.3).

    Bilinear, align_corners=False; an optional Gaussian over the patch scores is multiplied into the same two matrices.
    Both are left factors: OpenVINO rounds products with a constant on the right to bf16, and the score with them.

    Args:
        grid: (h, w).
        frame_size: (H, W).
        sigma: standard deviation of the Gaussian in patches; 0 for none.
    """

    def __init__(self, grid: tuple[int, int], frame_size: tuple[int, int], sigma: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rows", _tensor(_smoothed(grid[0], frame_size[0], sigma)))
        self.register_buffer("columns", _tensor(_smoothed(grid[1], frame_size[1], sigma)))
        self.rows: Tensor
        self.columns: Tensor

    def forward(self, scores: Tensor) -> Tensor:
        wide = torch.matmul(self.columns, scores.transpose(1, 2))
        return torch.matmul(self.rows, wide.transpose(1, 2))


def _smoothed(n_in: int, n_out: int, sigma: float) -> np.ndarray:
    upsample = upsample_matrix(n_in, n_out)
    if sigma == 0:
        return upsample
    return (upsample.astype(np.float64) @ gaussian_matrix(n_in, sigma).astype(np.float64)).astype(np.float32)


def _tensor(matrix: np.ndarray | None) -> Tensor | None:
    return None if matrix is None else torch.tensor(np.ascontiguousarray(matrix))
