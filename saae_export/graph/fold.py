"""Exact weight folding: constant affine steps merged into the linear layer beside them.

Each function returns a new layer and does not change its inputs. Products are computed in float64 and rounded once, so
the folded layer differs from the unfolded ones only by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "fold_batchnorm",
    "fold_input_norm",
    "fold_padded_input_norm",
    "fold_output_scale",
    "make_linear",
    "merge_linears",
]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen float32 linear layer from a weight, out x in, and a bias of `out` values, of any float dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().to(torch.float32).contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(torch.float32).contiguous(), requires_grad=False)
    return layer


def fold_input_norm(
    conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float], white: float = 255.0, zero: float = 0.0
) -> nn.Conv2d:
    """`conv(((x + zero) / white - mean) / std)` as one convolution of x.

    Exact only because the patch projection has no padding: a padded zero would have to stay zero after the shift.

    Args:
        conv: padding-free convolution over the image's channels.
        mean: per channel, in 0..1.
        std: per channel, in 0..1.
        white: pixel value of white.
        zero: pixel value that an x of 0 stands for.

    Raises:
        ValueError: the convolution pads its input, or is grouped.
    """
    if conv.padding not in ((0, 0), 0, "valid") or conv.groups != 1:
        raise ValueError("only a padding-free, ungrouped convolution can take the normalisation into its weights")
    weight = conv.weight.detach().double()
    shift = torch.tensor(mean, dtype=torch.float64) - zero / white
    scale = torch.tensor(std, dtype=torch.float64)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=True)  # type: ignore[arg-type]
    folded.weight = nn.Parameter(weight.div(scale.mul(white).view(1, -1, 1, 1)).float(), requires_grad=False)
    offset = (weight.sum(dim=(2, 3)) * (shift / scale)).sum(dim=1)
    folded.bias = nn.Parameter((bias - offset).float(), requires_grad=False)
    return folded


def fold_padded_input_norm(
    conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float], white: float = 255.0, zero: float = 0.0
) -> nn.Conv2d:
    """`conv(((x + zero) / white - mean) / std)` as one convolution of x with an added channel of ones, for any padding.

    With zero padding, which stands for the mean, the mean cannot go into the bias. It goes into the weights of the
    channel of ones, which is padded with zeros like x.

    Args:
        conv: convolution over the image's channels, not grouped.
        mean: per channel, in 0..1.
        std: per channel, in 0..1.
        white: pixel value of white.
        zero: pixel value that an x of 0 stands for.
    """
    weight = conv.weight.detach().double()
    shift = torch.tensor(mean, dtype=torch.float64) - zero / white
    scale = torch.tensor(std, dtype=torch.float64)
    ones = -(weight * (shift / scale).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    scaled = weight / scale.mul(white).view(1, -1, 1, 1)
    folded = nn.Conv2d(
        conv.in_channels + 1,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    folded.weight = nn.Parameter(torch.cat([scaled, ones], dim=1).float(), requires_grad=False)
    if conv.bias is not None:
        folded.bias = nn.Parameter(conv.bias.detach().float(), requires_grad=False)
    return folded


def fold_output_scale(linear: nn.Linear, scale: Tensor) -> nn.Linear:
    """`linear(x) * scale` as one linear layer; one scale per output (LayerScale, the attention's 1/sqrt(d))."""
    factor = scale.detach().double()
    bias = None if linear.bias is None else linear.bias.detach().double() * factor
    return make_linear(linear.weight.detach().double() * factor[:, None], bias)


def fold_batchnorm(linear: nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Linear:
    """`norm(linear(x))` in evaluation mode as one linear layer.

    Raises:
        ValueError: the batch norm has no running statistics, so it is not constant.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = (variance + norm.eps).rsqrt()
    shift = -mean * gain
    if norm.affine:
        gain = gain * norm.weight.detach().double()
        shift = shift * norm.weight.detach().double() + norm.bias.detach().double()
    scaled = fold_output_scale(linear, gain)
    bias = shift if linear.bias is None else linear.bias.detach().double() * gain + shift
    return make_linear(scaled.weight, bias)


def merge_linears(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """`second(first(x))` as one linear layer (two linear layers with nothing between them).

    One of the two may be narrower by an integer factor n. It then acts on each of n pieces of the other's values, like
    a convolution at every position of a patch, before or after the patch's projection.

    Args:
        first: from `in` to `middle` values, or on each of n pieces.
        second: from `middle` to `out` values, or on each of n pieces.
    """
    inner, outer = first.weight.detach().double(), second.weight.detach().double()
    before = torch.zeros(first.out_features).double() if first.bias is None else first.bias.detach().double()
    after = torch.zeros(second.out_features).double() if second.bias is None else second.bias.detach().double()
    if second.in_features >= first.out_features:
        pieces = outer.unflatten(1, (-1, first.out_features))  # out x n x middle
        weight, bias = (pieces @ inner).flatten(1), (pieces @ before).sum(dim=1) + after
    else:
        weight = (outer @ inner.unflatten(0, (-1, second.in_features))).flatten(0, 1)  # n x out x in
        bias = (before.unflatten(0, (-1, second.in_features)) @ outer.T + after).flatten()
    return make_linear(weight, None if first.bias is None and second.bias is None else bias)
