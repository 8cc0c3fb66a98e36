"""The fused graph: camera frame in, anomaly map, score and mask out, as one module ready for export.

Built from a fitted `saae_train.model.detector.Detector`, which is not changed and stays the reference. Precision is
explicit: with `fp16` the matrix products are FP16; the resize, the patch projection, LayerNorm, softmax, the
residual stream, the standardisation, every sum over channels, the upsample, score and mask are FP32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saae_runtime.errors import ConfigError
from saae_train.model.detector import Detector, FeatureSpace, Projected, memory_score
from saae_train.model.memory import Memory
from saae_train.model.vgg import VGGFeatures
from saae_train.model.vit import Features

from .fold import make_linear
from .frame import FrameToPixels, ScoresToMap
from .memory import GraphMemory
from .saae import GraphSAAE
from .vgg import GraphVGG
from .vit import GraphViT, cast

__all__ = ["GRAPH_PRECISIONS", "FusedGraph"]

GRAPH_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
"""Precisions that a graph can be exported in, and the type of its matrix products. INT8 is made from the FP32 ONNX."""


class _Space(nn.Module):
    """Features f to the space of the SAAE; see `saae_train.model.detector.FeatureSpace`.

    f FP32 N x (prefix + L) x U -> g N x L x channels (of `dtype` with components, else FP32), and with components the
    energy outside them and in total, FP32 N x L. The rows of class and register tokens are dropped last, where rows are
    narrowest; cutting them off f would copy all of it.

    Standardisation is not folded into the next product: raw channels with a large mean would lose their variation
    when rounded to FP16. The components' scales are in the basis. Products with it are of type `dtype`, the residual
    and its sum FP32.
    """

    def __init__(self, space: FeatureSpace, needs_energy: bool, dtype: torch.dtype, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        plain = not space.mean.any() and bool((space.scale == 1).all())
        self.register_buffer("scale", None if plain else space.scale.clone())
        shift = None if plain else (-space.mean.double() * space.scale.double()).float()
        self.register_buffer("shift", shift)
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.dtype = dtype
        self.basis: nn.Linear | None = None
        self.back: nn.Linear | None = None
        if space.basis is not None and space.component_scale is not None:
            scale = space.component_scale.double()
            self.basis = make_linear((space.basis.double() * scale).T, None).to(dtype)
            if needs_energy:
                self.back = make_linear(space.basis.double() / scale, None).to(dtype)

    def forward(self, f: Tensor) -> Projected:
        if self.scale is not None and self.shift is not None:
            f = f * self.scale + self.shift
        if self.basis is None:
            return Projected(self._patches(f))
        g = self.basis(cast(f, self.dtype))
        if self.back is None:
            return Projected(self._patches(g))
        residual = f - cast(self.back(g), torch.float32)
        residual_energy, energy = residual.square().sum(dim=2), f.square().sum(dim=2)
        return Projected(self._patches(g), self._patches(residual_energy), self._patches(energy))

    def _patches(self, rows: Tensor) -> Tensor:
        return rows[:, self.prefix :] if self.prefix else rows


def _direction(g: Tensor) -> Tensor:
    return g / (g * g).sum(dim=2, keepdim=True).clamp_min(1e-12).sqrt()


class _Score(nn.Module):
    """Anomaly score A from g and its reconstruction, FP32 N x L; see `saae_train.model.detector.anomaly_score`."""

    def __init__(self, kind: str, memory: Memory | None) -> None:
        super().__init__()
        self.kind = kind
        self.memory = None if memory is None else GraphMemory(memory)

    def forward(self, projected: Projected, g_hat: Tensor | None) -> Tensor:
        if g_hat is None:
            assert self.memory is not None
            return memory_score(self.memory(projected.g), None, self.memory.alpha, self.memory.beta)
        a, b = cast(projected.g, torch.float32), cast(g_hat, torch.float32)
        if self.kind == "l2":
            residual = a - b
            if projected.residual_energy is None:
                return torch.linalg.vector_norm(residual, dim=2)
            return (residual.square().sum(dim=2) + projected.residual_energy).sqrt()
        difference = _direction(a) - _direction(b)
        cosine = 0.5 * difference.square().sum(dim=2)
        if self.memory is not None:
            return memory_score(self.memory(projected.g), cosine, self.memory.alpha, self.memory.beta)
        if projected.residual_energy is None or projected.energy is None:
            return cosine
        residual = projected.residual_energy / projected.energy.clamp_min(1e-12).sqrt()
        return (cosine.clamp_min(1e-12).sqrt() * residual).clamp_min(1e-12).sqrt()


class FusedGraph(nn.Module):
    """`frame`, `threshold` -> `anomaly_map`, `score`, `mask`.

    Inputs: frame uint8 N x H x W x 3 RGB; threshold float32, one number, pixel T.
    Outputs: anomaly_map float32 N x H x W (eq. 3, upsampled); score float32 N, the largest value of the map; mask
    uint8 N x H x W, 1 where the map is above T.

    Args:
        detector: the fitted model; copied, not changed.
        frame_size: (H, W) of the frames; None for the model's own input size.
        precision: `fp32` or `fp16`.

    Raises:
        ConfigError: a precision that is not exported, or weights that FP16 cannot hold.
    """

    def __init__(self, detector: Detector, frame_size: tuple[int, int] | None = None, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in GRAPH_PRECISIONS:
            raise ConfigError(
                f"A graph cannot be exported as {precision}.", "", f"one of: {', '.join(GRAPH_PRECISIONS)}"
            )
        dtype = GRAPH_PRECISIONS[precision]
        self.precision = precision
        self.dtype = dtype
        self.model_size = detector.backbone.input_size
        self.frame_size = frame_size or self.model_size
        self.grid = detector.backbone.grid
        with torch.no_grad():
            self.pixels = FrameToPixels(self.frame_size, self.model_size)
            self.backbone = _graph_backbone(detector.backbone, dtype)
            self.space = _Space(detector.space, detector.score in ("l2", "joint"), dtype, self.backbone.prefix_tokens)
            # With an exponent of 0 the autoencoder has no effect, so the graph leaves it out.
            silent = detector.memory is not None and float(detector.memory.alpha) == 0.0
            self.saae = None if silent else GraphSAAE(detector.saae, dtype)
            self.anomaly = _Score(detector.score, detector.memory)
            self.map = ScoresToMap(self.grid, self.frame_size, detector.smoothing)
        self.eval().requires_grad_(False)
        _check_weights(self, precision)

    def forward(self, frame: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.space(self.backbone(self.pixels(frame)))
        g_hat = None if self.saae is None else self.saae(cast(projected.g, self.dtype))
        scores = self.anomaly(projected, g_hat)
        anomaly_map = self.map(scores.unflatten(1, self.grid))
        # Via float: TensorRT makes uint8 outputs only from floating point.
        mask = (anomaly_map > threshold).to(torch.float32).to(torch.uint8)
        return anomaly_map, anomaly_map.amax(dim=(1, 2)), mask


def _graph_backbone(backbone: Features, dtype: torch.dtype) -> GraphViT | GraphVGG:
    return GraphVGG(backbone, dtype) if isinstance(backbone, VGGFeatures) else GraphViT(backbone, dtype)


def _check_weights(graph: FusedGraph, precision: str) -> None:
    for name, value in (*graph.named_parameters(), *graph.named_buffers()):
        if not bool(torch.isfinite(value).all()):
            cure = "use --precision fp32" if precision == "fp16" else "fit the model again: saae-export build --refit"
            raise ConfigError(
                f"The weight {name} is not finite in {precision}.",
                "It is NaN, or too large for FP16 (above 65504)." if precision == "fp16" else "The model holds a NaN.",
                cure,
            )
