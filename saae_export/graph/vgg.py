"""The exported form of the frozen VGG19: pixel normalisation folded, alignment as constant matrices, explicit FP16.

Mirrors `saae_train.model.vgg.VGGFeatures` on copied weights. With `dtype=torch.float16` the convolutions and their
activations are FP16; the first convolution, which takes pixels, and the alignment, which sums them up, stay FP32.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saae_train.model.vgg import VGGFeatures

from .fold import fold_padded_input_norm
from .frame import MIDDLE
from .vit import cast

__all__ = ["GraphVGG"]


class _Align(nn.Module):
    """A map N x C x n x m -> FP32 N x C x h x w by one constant matrix per axis."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.clone())
        self.register_buffer("columns", columns.T.contiguous())  # transposed here, not by a node in the graph
        self.rows: Tensor
        self.columns: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(self.rows, cast(x, torch.float32)), self.columns)


class GraphVGG(nn.Module):
    """Pixels minus MIDDLE in, stacked features out: N x H x W x 3 FP32 -> N x (h*w) x U FP32.

    The first convolution pads with zeros, which stand for the mean colour, so the mean goes into the weights of a
    fourth channel of ones. A subtraction before it would be right as well, but OpenVINO (plug-in 1.8.1) fuses that
    into the product that resizes the frame and then fails to compile.
    """

    prefix_tokens = 0

    def __init__(self, backbone: VGGFeatures, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.dtype = backbone.layers, dtype
        self.strides = backbone.strides
        self.pooled = [backbone.pooled(index) for index in range(len(backbone.convs))]
        first, *others = backbone.convs
        self.proj = fold_padded_input_norm(first, backbone.mean, backbone.std, zero=MIDDLE)  # type: ignore[arg-type]
        self.convs = nn.ModuleList(copy.deepcopy(conv).to(dtype) for conv in others)
        matrices = dict(backbone.named_buffers())
        strides = {self.strides[layer - 1] for layer in self.layers}
        self.align = nn.ModuleDict(
            {str(stride): _Align(matrices[f"rows_{stride}"], matrices[f"columns_{stride}"]) for stride in strides}
        )

    def forward(self, pixels: Tensor) -> Tensor:
        with_ones = F.pad(pixels.permute(0, 3, 1, 2), (0, 0, 0, 0, 0, 1), value=1.0)
        x = cast(self.proj(with_ones).relu(), self.dtype)
        maps = []
        for index in range(len(self.pooled)):
            if index:
                x = F.max_pool2d(x, 2) if self.pooled[index] else x
                x = self.convs[index - 1](x).relu()
            if index + 1 in self.layers:
                maps.append(self.align[str(self.strides[index])](x))
        features = torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]
        return features.flatten(2).transpose(1, 2)
