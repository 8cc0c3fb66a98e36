"""The exported form of the frozen ViT: fused projections, folded scales, explicit FP16 casts.

Mirrors `saae_train.model.vit.ViTFeatures` (paper section 3.1) on copied weights. With `dtype=torch.float16` the matrix
products and the activations are FP16; the patch projection, LayerNorm, softmax and the residual stream stay FP32. The
residual stream makes up the features, and keeping it FP32 needs no more casts than FP16 would, because LayerNorm reads
FP32 anyway.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from saae_train.model.vit import ViTFeatures

from .fold import fold_input_norm, fold_output_scale, make_linear
from .frame import MIDDLE

__all__ = ["GraphAttention", "GraphViT", "attend", "cast", "plain_norm"]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, without a node in the graph if it has that type already."""
    return x if x.dtype == dtype else x.to(dtype)


def plain_norm(norm: nn.Module) -> nn.Module:
    """A LayerNorm (or Identity) as torch's own FP32 module: timm's subclasses switch kernels by global flags."""
    if isinstance(norm, nn.LayerNorm):
        shape = tuple(norm.normalized_shape)
        fresh = nn.LayerNorm(shape, eps=norm.eps, elementwise_affine=norm.elementwise_affine)
        fresh.load_state_dict(norm.state_dict())
        return fresh.requires_grad_(False)
    return copy.deepcopy(norm).float()


def attend(q: Tensor, k_transposed: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v with the softmax in FP32; the 1/sqrt(d) is in the weights that made q.

    Args:
        q: (N or 1) x heads x Lq x d.
        k_transposed: N x heads x d x Lk.
        v: N x heads x Lk x d.

    Returns:
        N x Lq x (heads * d), of v's dtype.
    """
    weights = cast(torch.matmul(q, k_transposed), torch.float32).softmax(dim=-1)
    mixed = torch.matmul(cast(weights, v.dtype), v)
    return mixed.permute(0, 2, 1, 3).flatten(2)


class GraphAttention(nn.Module):
    """Multi-head self-attention with one fused qkv product, 1/sqrt(d) folded into the query's rows.

    Input and output: N x L x D of the layer's dtype.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        heads: int,
        tokens: int,
        dtype: torch.dtype,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.head_width = qkv.out_features // (3 * heads)
        self.scale = self.head_width**-0.5
        self.q_norm = None if _is_identity(q_norm) else plain_norm(q_norm)
        self.k_norm = None if _is_identity(k_norm) else plain_norm(k_norm)
        if self.q_norm is None:
            rows = torch.ones(qkv.out_features)
            rows[: qkv.out_features // 3] = self.scale
            qkv = fold_output_scale(qkv, rows)
        self.qkv = copy.deepcopy(qkv).to(dtype)
        self.proj = copy.deepcopy(proj).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).reshape(-1, self.tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0], heads[1], heads[2]
        if self.q_norm is not None:
            q = cast(self.q_norm(cast(q, torch.float32)) * self.scale, x.dtype)
        if self.k_norm is not None:
            k = cast(self.k_norm(cast(k, torch.float32)), x.dtype)
        return self.proj(attend(q, k.transpose(-1, -2), v))


class Gelu(nn.Module):
    """GELU by its definition, in the order of operations that ONNX Runtime recognises and computes in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x * (1.0 + torch.erf(x / math.sqrt(2.0))))


def activation(module: nn.Module) -> nn.Module:
    """A copy of an activation, GELU as `Gelu`."""
    exact = isinstance(module, nn.GELU) and module.approximate == "none"
    return Gelu() if exact else copy.deepcopy(module)


class GraphMlp(nn.Module):
    """fc1, activation, fc2 (LayerScale folded into fc2). Input and output: N x L x D of the layer's dtype."""

    def __init__(self, mlp: Mlp, gamma: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = copy.deepcopy(mlp.fc1).to(dtype)
        self.act = activation(mlp.act)
        self.norm = None if isinstance(mlp.norm, nn.Identity) else plain_norm(mlp.norm)
        self.fc2 = (copy.deepcopy(mlp.fc2) if gamma is None else fold_output_scale(mlp.fc2, gamma)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        if self.norm is not None:
            hidden = cast(self.norm(cast(hidden, torch.float32)), x.dtype)
        return self.fc2(hidden)


class GraphBlock(nn.Module):
    """One pre-norm block; the residual stream (N x L x D) is FP32 in and out."""

    def __init__(self, block: Block, tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        attention = block.attn
        gamma1, gamma2 = getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)
        proj = attention.proj if gamma1 is None else fold_output_scale(attention.proj, gamma1)
        self.dtype = dtype
        self.norm1, self.norm2 = plain_norm(block.norm1), plain_norm(block.norm2)
        self.attn = GraphAttention(
            attention.qkv, proj, attention.num_heads, tokens, dtype, attention.q_norm, attention.k_norm
        )
        self.mlp = GraphMlp(block.mlp, gamma2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + cast(self.attn(cast(self.norm1(x), self.dtype)), torch.float32)
        return x + cast(self.mlp(cast(self.norm2(x), self.dtype)), torch.float32)


def _graph_block(block: nn.Module, tokens: int, dtype: torch.dtype) -> nn.Module:
    """The exported form of a timm block; an unusual block is copied unchanged in FP32, correct but slower."""
    plain = type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp
    attention: Any = block.attn if plain else None
    if not plain or getattr(attention, "gate", None) is not None or not _is_identity(getattr(attention, "norm", None)):
        return copy.deepcopy(block).float()
    return GraphBlock(block, tokens, dtype)


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


class GraphViT(nn.Module):
    """Pixels minus MIDDLE in, stacked features out: N x H x W x 3 FP32 -> N x (prefix_tokens + h*w) x U FP32, eq. (1).

    The rows of class and register tokens come first; the caller drops them where that is cheapest. With tiles the rows
    are those of the whole input, without these tokens.
    """

    def __init__(self, backbone: ViTFeatures, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = backbone.layers
        self.tiles = backbone.tiles
        height, width = self.tiles.window
        tokens = height * width + backbone.prefix_tokens
        self.pad = backbone.prefix_tokens
        self.prefix_tokens = 0 if len(self.tiles) > 1 else self.pad  # joining windows drops them
        # FP32: 1/255 and 1/std in the weights would push them towards FP16's subnormals.
        convolution = fold_input_norm(backbone.patch_embed.proj, backbone.mean, backbone.std, zero=MIDDLE)
        self.grid, self.patch = self.tiles.window, convolution.weight.shape[2:]
        self.proj = make_linear(convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
        self.register_buffer("position", torch.cat([backbone.prefix, backbone.position], dim=1).detach().float())
        self.register_buffer("place", self.tiles.index(self.pad) if len(self.tiles) > 1 else None)
        self.position: Tensor
        self.place: Tensor | None
        self.norm_pre = plain_norm(backbone.norm_pre)
        self.blocks = nn.ModuleList(_graph_block(block, tokens, dtype) for block in backbone.blocks)

    def _patches(self, pixels: Tensor) -> Tensor:
        """N x H x W x 3 -> N x (h*w) x (p*p*3): as a product, the patch projection gives tokens as rows."""
        (height, width), (p, q) = self.grid, self.patch
        rows = pixels.reshape(-1, height, p, width, q * 3).transpose(2, 3)
        return rows.reshape(-1, height * width, p * q * 3)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.place is not None:
            pixels = self.tiles.cut(pixels, self.patch[0], axis=1)
        tokens = self.proj(self._patches(pixels))
        if self.pad:  # zeros, to which the position table adds the class and register tokens
            tokens = F.pad(tokens, (0, 0, self.pad, 0))
        maps = [tokens] if 0 in self.layers else []
        tokens = self.norm_pre(tokens + self.position)
        for index, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if index in self.layers:
                maps.append(tokens)
        f = torch.cat(maps, dim=2) if len(maps) > 1 else maps[0]
        return f if self.place is None else self.tiles.join(f, self.place)
