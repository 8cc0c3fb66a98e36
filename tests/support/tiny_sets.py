"""A category on disk whose defects a pixel's brightness shows: gray pictures with a bright square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TINY_CHANGES = {
    "backbone": "vit_tiny_patch16_224",
    "layers": (1, 2),
    "input_size": (64, 64),
    "components": 16,
    "latent": 6,
    "steps": 3,
    "batch": 2,
    "precision": "fp32",
}
"""FitConfig fields of a model that fits in a second."""


def write_square_set(
    root: Path, name: str = "part", train: int = 10, good: int = 3, bad: int = 3, masks: bool = True
) -> Path:
    """Writes `train` + `good` + `bad` pictures of 70 x 64 in the MVTec AD layout; returns `root`."""
    rng = np.random.default_rng(sum(name.encode()))

    def save(path: Path, square: bool = False) -> None:
        picture = rng.integers(80, 120, (70, 64, 3))
        if square:
            picture[20:50, 16:48] = 250
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)

    for i in range(train):
        save(root / name / "train/good" / f"{i}.png")
    for i in range(good):
        save(root / name / "test/good" / f"{i}.png")
    for i in range(bad):
        save(root / name / "test/spot" / f"{i}.png", square=True)
        if masks:
            mask = np.zeros((70, 64), np.uint8)
            mask[20:50, 16:48] = 255
            path = root / name / "ground_truth/spot" / f"{i}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root
