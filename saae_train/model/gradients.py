"""Gradients that are cheaper than PyTorch's own: of attention and linear layers in bfloat16, and of the cosine.

The forward pass is PyTorch's, bit for bit. The gradients are the same sums with other rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["attention", "cosine_distance", "linear"]

_WIDE = 1 << 18
"""Number of weights from which a contiguous copy of the transposed gradient makes the product faster."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`functional.linear` in bfloat16.

    Args:
        x: ... x I.
        weight: O x I.
        bias: O.

    Returns:
        bfloat16, ... x O.
    """
    half = torch.bfloat16
    return _Linear.apply(x.to(half), weight.to(half), bias.to(half))


def attention(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    """Multi-head attention.

    Args:
        query: bfloat16, N x L x E.
        key_value: bfloat16, N x M x 2E, the keys first.
        heads: attention heads.

    Returns:
        bfloat16, N x L x E.
    """
    return _Attention.apply(query, key_value, heads)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine between rows; a zero row has length 1e-6. Only `b` gets gradients.

    Args:
        a: float32, N x L x C, fixed.
        b: float32, N x L x C.

    Returns:
        float32, N x L.
    """
    return _CosineDistance.apply(a, b)


class _CosineDistance(torch.autograd.Function):
    """Written out to make few passes over the features, the widest rows of a step."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        length_a, length_b = (torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-6) for x in (a, b))
        product = (a * b).sum(dim=2, keepdim=True)
        ctx.save_for_backward(a, b, length_a, length_b, product)
        return 1.0 - (product / (length_a * length_b)).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        a, b, length_a, length_b, product = ctx.saved_tensors
        to_a = outer.unsqueeze(2) / (length_a * length_b)
        return None, (b * (to_a * product / length_b.square())).addcmul_(a, to_a, value=-1.0)


class _Linear(torch.autograd.Function):
    """A product with a long transposed matrix runs at a third of the speed, so it is copied first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        outer_rows = outer.flatten(0, -2)
        across = outer_rows.t()
        if weight.numel() >= _WIDE:
            across = across.contiguous()
        return (
            outer @ weight if need_x else None,
            across @ x.flatten(0, -2) if need_weight else None,
            outer_rows.sum(dim=0) if need_bias else None,
        )


class _Attention(torch.autograd.Function):
    """Forward is PyTorch's fused attention; backward uses matrix products image by image, which stay in cache."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(query, key_value)
        ctx.heads = heads
        q, k, v = _split(query, key_value, heads)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key_value = ctx.saved_tensors
        heads: int = ctx.heads
        scale = (query.shape[2] // heads) ** -0.5
        d_query, d_key_value = torch.empty_like(query), torch.empty_like(key_value)
        scores, mixing, d_mixing = query.new_empty(3, heads, query.shape[1], key_value.shape[1])
        # A contiguous copy per head first: products of strided rows are slower.
        parts = (*_split(query * scale, key_value, heads), outer.unflatten(2, (heads, -1)).transpose(1, 2))
        images = zip(*(part.contiguous().unbind(0) for part in parts), strict=True)
        gradients = zip(*(part.unbind(0) for part in _split(d_query, d_key_value, heads)), strict=True)
        for (q, k, v, d_out), (dq, dk, dv) in zip(images, gradients, strict=True):
            torch.bmm(q, k.transpose(1, 2), out=scores)
            torch.softmax(scores, dim=2, out=mixing)
            dv.copy_(torch.bmm(mixing.transpose(1, 2), d_out))
            torch.bmm(d_out, v.transpose(1, 2), out=d_mixing)
            torch._softmax_backward_data(d_mixing, mixing, 2, mixing.dtype, grad_input=scores)
            dq.copy_(torch.bmm(scores, k))
            dk.copy_(torch.bmm(scores.transpose(1, 2), q))
        return d_query * scale, d_key_value, None


def _split(query: Tensor, key_value: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries, keys and values: N x heads x length x width."""
    q = query.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = key_value.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
