"""Frozen VGG19 features, aligned on one grid as in DFR: the paper's ablation "w/o ViT" and its speed baseline.

DFR is Yang, Shi and Qi, "Unsupervised anomaly segmentation via deep feature reconstruction", Neurocomputing 2021 (the
paper's [3]); sections 4.3 and 4.4.2 use its regional feature generator on the first 12 feature maps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saae_runtime.errors import ConfigError

from .sizes import check_size
from .tiles import Tiles
from .weights import WeightsInfo, load_into, load_state_dict, random_info

__all__ = ["PIXELS", "VGGFeatures", "align_matrix", "bare_vgg", "build_vgg", "check_vgg", "is_vgg"]

PIXELS = 4
"""Side of a grid position in pixels: DFR averages 4 x 4 pixels without overlap."""

_FAMILY = "vgg19"


def is_vgg(name: str) -> bool:
    """Whether a timm model name, with or without its pretrained tag, is VGG19."""
    return name.split(".", 1)[0] == _FAMILY


class VGGFeatures(nn.Module):
    """The first convolutions of VGG19, giving the stacked features f on a grid of 4 x 4 pixels.

    Layer i is the output of convolution i after its ReLU (1 = relu1_1, 12 = relu4_4, 16 = relu5_4). Every map is
    brought to the image's size, bilinearly with aligned corners, and averaged over 4 x 4 pixels: DFR's own steps, as
    one constant matrix per axis. Convolutions above the highest layer are cut off.

    Attributes:
        name: timm model name.
        layers: ascending layer indices, from 1.
        input_size: (height, width) in pixels.
        patch: pixels of a grid position, 4.
        grid: (h, w) = input size / 4.
        widths: channels of each layer.
        channels: U, their sum; 3456 for layers 1 to 12.
        mean, std: normalisation of an RGB image scaled to 0..1, three floats each.
        weights: what was loaded.
        saae_patch: the SAAE's default patch size (paper section 4.3: 8).
    """

    saae_patch = 8

    def __init__(
        self,
        features: nn.Sequential,
        name: str,
        layers: Sequence[int],
        input_size: tuple[int, int],
        weights: WeightsInfo,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.layers = tuple(layers)
        self.weights = weights
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.patch = PIXELS
        self.grid = (self.input_size[0] // PIXELS, self.input_size[1] // PIXELS)
        self.tiles = Tiles.over(self.grid)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        convs, self.strides = _convolutions(features)
        self.convs = nn.ModuleList(convs[: max(self.layers)])
        self.widths = tuple(convs[layer - 1].out_channels for layer in self.layers)
        self.channels = sum(self.widths)
        # One per stride; not saved, because the geometry gives them.
        for stride in {self.strides[layer - 1] for layer in self.layers}:
            for axis, side in zip(("rows", "columns"), self.input_size, strict=True):
                matrix = torch.tensor(align_matrix(side // stride, side))
                self.register_buffer(f"{axis}_{stride}", matrix, persistent=False)
        self.eval().requires_grad_(False)

    def pooled(self, index: int) -> bool:
        """Whether a 2 x 2 maximum comes before convolution `index` (from 0)."""
        return index > 0 and self.strides[index] != self.strides[index - 1]

    def align(self, x: Tensor, stride: int) -> Tensor:
        """A map of the given stride, N x C x H/stride x W/stride, on the grid: float32 N x C x h x w."""
        # Sums of up to 16 x 16 values need FP32.
        with torch.autocast(x.device.type, enabled=False):
            down = torch.matmul(self.get_buffer(f"rows_{stride}"), x.float())
            return torch.matmul(down, self.get_buffer(f"columns_{stride}").T)

    def aligned(self, x: Tensor) -> list[Tensor]:
        """x as in `layer_maps` -> one float32 N x widths[i] x h x w tensor per layer, ascending."""
        maps = []
        for index, conv in enumerate(self.convs):
            if self.pooled(index):
                x = F.max_pool2d(x, 2)
            x = conv(x).relu()
            if index + 1 in self.layers:
                maps.append(self.align(x, self.strides[index]))
        return maps

    def layer_maps(self, x: Tensor) -> list[Tensor]:
        """The aligned maps of the chosen layers.

        Args:
            x: float, N x 3 x H x W, normalised with `mean` and `std`, of `input_size`.

        Returns:
            One N x (h*w) x widths[i] tensor per layer, ascending.
        """
        return [z.flatten(2).transpose(1, 2) for z in self.aligned(x)]

    def forward(self, x: Tensor) -> Tensor:
        """The stacked features f, eq. (1) with VGG19's maps: N x (h*w) x U."""
        return torch.cat(self.aligned(x), dim=1).flatten(2).transpose(1, 2)


@lru_cache(maxsize=32)
def align_matrix(n_in: int, pixels: int) -> np.ndarray:
    """DFR's alignment along one axis: bilinear to the image's size with aligned corners, then means of 4.

    Args:
        n_in: values of the map.
        pixels: of the image, a multiple of 4.

    Returns:
        float32, (pixels / 4) x n_in (read-only; shared between callers).
    """
    position = np.arange(pixels) * ((n_in - 1) / max(1, pixels - 1))
    left = np.minimum(position.astype(np.int64), max(0, n_in - 2))
    share = position - left
    upsample = np.zeros((pixels, n_in))
    rows = np.arange(pixels)
    np.add.at(upsample, (rows, left), 1.0 - share)
    np.add.at(upsample, (rows, np.minimum(left + 1, n_in - 1)), share)
    matrix = upsample.reshape(-1, PIXELS, n_in).mean(axis=1).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def build_vgg(
    name: str,
    layers: Sequence[int],
    input_size: tuple[int, int],
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> VGGFeatures:
    """Build the frozen extractor; see `saae_train.model.vit.build_backbone`.

    Raises:
        ConfigError: an unknown pretrained tag or layer, or a size that its stride does not divide.
        WeightsError: weights missing or not fitting.
    """
    features, mean, std = _network(name)
    chosen = _checked(name, features, layers, input_size)
    _initialise(features, seed)
    if weights is not None and os.fspath(weights) == "random":
        info = random_info(features.state_dict())
    else:
        state, info = load_state_dict(name, weights)
        load_into(nn.ModuleDict({"features": features}), state, info, name, part=("features.",))
    return VGGFeatures(features, name, chosen, input_size, info, mean, std)


def check_vgg(name: str, layers: Sequence[int], input_size: tuple[int, int]) -> None:
    """Check the arguments of `build_vgg` without weights. Raises ConfigError."""
    _checked(name, _network(name)[0], layers, input_size)


def _checked(name: str, features: nn.Sequential, layers: Sequence[int], input_size: tuple[int, int]) -> list[int]:
    """The layers in order, if there are such layers and the input size is a multiple of their stride."""
    convs, strides = _convolutions(features)
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 1 or chosen[-1] > len(convs):
        wrong = next((layer for layer in chosen if not 1 <= layer <= len(convs)), None)
        raise ConfigError(
            f"Layers {list(layers)} are not possible." if wrong is None else f"{name} has no layer {wrong}.",
            f"Its layers are the convolutions 1 to {len(convs)}; only a ViT has layer 0, the patch projection.",
            f"choose layers from 1 to {len(convs)}; the paper takes 1-12",
        )
    step = max(PIXELS, strides[chosen[-1] - 1])
    check_size(name, input_size, step, f"Layer {chosen[-1]} needs multiples of {step}.")
    return chosen


def bare_vgg(name: str, layers: Sequence[int], input_size: tuple[int, int], info: WeightsInfo) -> VGGFeatures:
    """The same modules without weights, for reading a checkpoint."""
    features, mean, std = _network(name)
    return VGGFeatures(features.to_empty(device="cpu"), name, layers, input_size, info, mean, std)


def _network(name: str) -> tuple[nn.Sequential, Sequence[float], Sequence[float]]:
    """timm's convolutions without storage, and the normalisation. Most of the classifier is not created."""
    try:
        with torch.device("meta"):
            vgg = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be built.", str(error), f"use --backbone {_FAMILY}") from error
    config = vgg.pretrained_cfg
    return vgg.features, config["mean"], config["std"]


def _initialise(features: nn.Sequential, seed: int) -> None:
    """Allocate random weights as VGG's authors do, so that the variance is the same in all layers."""
    features.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for conv in _convolutions(features)[0]:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def _convolutions(features: nn.Sequential) -> tuple[list[nn.Conv2d], list[int]]:
    """The convolutions in order, and the stride of each one's output in pixels."""
    convs, strides, stride = [], [], 1
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            stride *= 2
        elif isinstance(module, nn.Conv2d):
            convs.append(module)
            strides.append(stride)
    return convs, strides
