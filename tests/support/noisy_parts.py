"""Noisy gray images of good parts, whose scores by the tiny bundle follow from their level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 96)


def draw(folder: Path, count: int = 9, level: int = 60, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """Noisy pictures around a gray level: the further from 128, the higher the tiny bundle's scores."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = rng.normal(level, 6, (*size, 3)).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def frames(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
