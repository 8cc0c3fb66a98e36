"""DFR in plain PyTorch with random weights: the method that the paper measures its speed against (section 4.5).

Deep feature reconstruction: the first 12 feature maps of VGG19 (after each ReLU, relu1_1 .. relu4_4) of a 256 x 256
image, aligned on a 64 x 64 grid and stacked to 3456 channels, reconstructed by a convolutional autoencoder with 1 x 1
kernels. The maps are brought to the grid at once (larger ones averaged, smaller ones upsampled), which is cheaper than
bringing all of them to 256 x 256 first and averaging then.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

__all__ = ["CHANNELS", "DFR", "GRID", "INPUT"]

INPUT = (256, 256)
GRID = (64, 64)
CHANNELS = 3456
_LAYERS = 27  # of VGG19's `features`: up to relu4_4
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DFR(nn.Module):
    """uint8 frames [N, 256, 256, 3], threshold [1] -> anomaly map [N, 256, 256], score [N], mask, as the fused graph.

    Args:
        latent: width of the code, V in the paper.
        seed: of the random weights.
    """

    def __init__(self, latent: int = 300, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vgg = make_layers(cfgs["E"], batch_norm=False)[:_LAYERS]
            middle = (CHANNELS + 2 * latent) // 2
            widths = (CHANNELS, middle, 2 * latent, latent, 2 * latent, middle, CHANNELS)
            units: list[nn.Module] = []
            for number, (a, b) in enumerate(itertools.pairwise(widths)):
                units.append(nn.Conv2d(a, b, 1))
                if number not in (2, 5):  # neither the code nor the output
                    units += [nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
            self.cae = nn.Sequential(*units)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1) * 255)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """x: float32 [N, 3, 256, 256], 0..255 -> f: [N, 3456, 64, 64]."""
        x = (x - self.mean) / self.std
        maps = []
        for layer in self.vgg:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(_align(x))
        return torch.cat(maps, dim=1)

    def forward(self, frame: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.features(frame.permute(0, 3, 1, 2).float())
        distance = torch.linalg.vector_norm((f - self.cae(f)).float(), dim=1, keepdim=True)
        anomaly_map = F.interpolate(distance, INPUT, mode="bilinear", align_corners=False)[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2)), (anomaly_map > threshold).to(torch.uint8)


def _align(x: Tensor) -> Tensor:
    side = x.shape[-1]
    if side > GRID[1]:
        return F.avg_pool2d(x, side // GRID[1])
    if side < GRID[1]:
        return F.interpolate(x, GRID, mode="bilinear", align_corners=False)
    return x
