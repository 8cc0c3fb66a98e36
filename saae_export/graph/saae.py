"""The exported form of the self-attention autoencoder: constants precomputed, linear layers merged.

Mirrors `saae_train.model.saae.SAAE` (paper section 3.2) on copied weights. Folded exactly: BatchNorm (into its
convolution); the encoder's last convolution and the patch embedding (one product); position encodings after a linear
layer (a table in place of the bias); the decoder's self-attention over the learned queries, which does not depend on
the frame (a table); the decoder's last projection (into the next convolution).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saae_train.model.saae import (
    SAAE,
    Attention,
    PointwiseCoder,
    TransformerDecoder,
    TransformerEncoder,
    from_patches,
    to_patches,
)

from .fold import fold_batchnorm, fold_output_scale, make_linear, merge_linears
from .vit import Gelu, GraphAttention, attend, cast, plain_norm

__all__ = ["GraphSAAE"]


def _coder(coder: PointwiseCoder) -> list[nn.Linear]:
    """The three convolutions with their BatchNorms folded in."""
    first, second, third = coder.convs
    return [fold_batchnorm(first, coder.norms[0]), fold_batchnorm(second, coder.norms[1]), third]  # type: ignore[arg-type]


def _attention(attention: Attention, tokens: int, dtype: torch.dtype) -> GraphAttention:
    """Self-attention with query, key and value as one product."""
    weight = torch.cat([attention.query.weight, attention.key_value.weight])
    bias = torch.cat([attention.query.bias, attention.key_value.bias])
    return GraphAttention(make_linear(weight, bias), attention.project, attention.heads, tokens, dtype)


class _Mlp(nn.Module):
    def __init__(self, mlp: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = make_linear(mlp[0].weight, mlp[0].bias).to(dtype)  # type: ignore[arg-type]
        self.act = Gelu()
        self.fc2 = make_linear(mlp[2].weight, mlp[2].bias).to(dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Encoder(nn.Module):
    """N x L x V FP32 -> memory N x L x V of `dtype`."""

    def __init__(self, encoder: TransformerEncoder, tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm1, self.norm2, self.norm = (plain_norm(m) for m in (encoder.norm1, encoder.norm2, encoder.norm))
        self.attention = _attention(encoder.attention, tokens, dtype)
        self.mlp = _Mlp(encoder.mlp, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + cast(self.attention(cast(self.norm1(x), self.dtype)), torch.float32)
        x = x + cast(self.mlp(cast(self.norm2(x), self.dtype)), torch.float32)
        return cast(self.norm(x), self.dtype)


class _Decoder(nn.Module):
    """Memory N x L x V of `dtype` -> N x L x V of `dtype`; the queries' self-attention is a constant."""

    def __init__(
        self, decoder: TransformerDecoder, queries: Tensor, position: Tensor, tokens: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        cross = decoder.cross_attention
        self.dtype, self.heads, self.tokens = dtype, cross.heads, tokens
        width = cross.project.out_features
        self.head_width = width // self.heads
        with torch.no_grad():
            x = queries + position
            y = decoder.norm1(x)
            x = x + decoder.self_attention(y, y)
            query = fold_output_scale(cross.query, torch.full((width,), self.head_width**-0.5))(decoder.norm2(x))
            split = query.reshape(1, tokens, self.heads, self.head_width).permute(0, 2, 1, 3)
            table = position @ cross.key_value.weight.T + cross.key_value.bias
            residual = x + cross.project.bias
        self.register_buffer("query", split.contiguous().to(dtype))
        self.register_buffer("key_value_table", table.detach().to(dtype))
        self.register_buffer("residual", residual.detach())
        self.query: Tensor
        self.key_value_table: Tensor
        self.residual: Tensor
        self.key_value = make_linear(cross.key_value.weight, None).to(dtype)
        self.project = make_linear(cross.project.weight, None).to(dtype)
        self.norm3, self.norm = plain_norm(decoder.norm3), plain_norm(decoder.norm)
        self.mlp = _Mlp(decoder.mlp, dtype)

    def forward(self, memory: Tensor) -> Tensor:
        key, value = (
            part.reshape(-1, self.tokens, self.heads, self.head_width)
            for part in (self.key_value(memory) + self.key_value_table).chunk(2, dim=-1)
        )
        mixed = attend(self.query, key.permute(0, 2, 3, 1), value.permute(0, 2, 1, 3))
        x = self.residual + cast(self.project(mixed), torch.float32)
        x = x + cast(self.mlp(cast(self.norm3(x), self.dtype)), torch.float32)
        return cast(self.norm(x), self.dtype)


class GraphSAAE(nn.Module):
    """Features to their reconstruction: N x L x U -> N x L x U, both of `dtype`."""

    def __init__(self, saae: SAAE, dtype: torch.dtype) -> None:
        super().__init__()
        if saae.training:
            raise ValueError("put the model into evaluation mode first: its BatchNorm is folded as a constant")
        conv1, conv2, conv3 = _coder(saae.encoder)
        conv4, conv5, conv6 = _coder(saae.decoder)
        self.transformer = saae.transformer
        self.grid, self.patch = saae.grid, saae.patch
        if saae.transformer:
            embed = merge_linears(conv3, saae.embed)
            table = saae.position.detach() + embed.bias.detach()
            self.register_buffer("position_table", table)
            self.position_table: Tensor
            self.embed = make_linear(embed.weight, None).to(dtype)
            self.encoder = _Encoder(saae.transformer_encoder, saae.tokens, dtype)
            self.decoder = _Decoder(
                saae.transformer_decoder, saae.queries.detach(), saae.position.detach(), saae.tokens, dtype
            )
            conv4 = merge_linears(saae.project, conv4)
        else:
            conv4 = merge_linears(conv3, conv4)
        self.conv1, self.conv2 = conv1.to(dtype), make_linear(conv2.weight, conv2.bias).to(dtype)
        self.conv4, self.conv5 = conv4.to(dtype), conv5.to(dtype)
        self.conv6 = make_linear(conv6.weight, conv6.bias).to(dtype)
        self.requires_grad_(False)

    def forward(self, f: Tensor) -> Tensor:
        g = self.conv2(self.conv1(f).relu()).relu()
        if not self.transformer:
            return self.conv6(self.conv5(self.conv4(g).relu()).relu())
        if self.patch > 1:
            g = to_patches(g, self.grid, self.patch)
        g = self.conv4(self.decoder(self.encoder(cast(self.embed(g), torch.float32) + self.position_table))).relu()
        if self.patch > 1:
            g = from_patches(g, self.grid, self.patch)
        return self.conv6(self.conv5(g).relu())
