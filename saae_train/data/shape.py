"""The shape of a product's images, and the model's input size that follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saae_runtime.images import open_image

from .category import Sample

__all__ = ["ImageShape", "follow_shape", "image_size", "typical_shape"]

_TURNED = (5, 6, 7, 8)
"""Values of the EXIF orientation (tag 0x0112) that swap an image's sides."""

_MOST = 4.0
"""Largest ratio between the sides of the input. A longer image is squeezed, with a warning."""


@dataclass(frozen=True)
class ImageShape:
    """The sizes of a list of images.

    Attributes:
        size: (height, width) of the typical image: the median ratio of the sides at the median area.
        shared: whether every image has exactly this size.
        spread: largest ratio height / width divided by the smallest one; 1 if all have one shape.
    """

    size: tuple[int, int]
    shared: bool
    spread: float

    @property
    def mixed(self) -> bool:
        """Whether the shapes differ by more than a quarter, so that one input size distorts some of them."""
        return self.spread > 1.25


def image_size(sample: Sample) -> tuple[int, int]:
    """(height, width) of an image as it is read (EXIF rotation applied), from the file's header alone."""
    with open_image(sample.path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in _TURNED
    return (width, height) if turned else (height, width)


def typical_shape(samples: Sequence[Sample]) -> ImageShape | None:
    """The shape of a list of images; None for an empty list."""
    sizes = [image_size(sample) for sample in samples]
    if not sizes:
        return None
    if len(set(sizes)) == 1:
        return ImageShape(sizes[0], True, 1.0)
    ratios = sorted(math.log(height / width) for height, width in sizes)
    areas = sorted(height * width for height, width in sizes)
    ratio, area = math.exp(ratios[len(ratios) // 2]), areas[len(areas) // 2]
    size = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
    return ImageShape(size, False, math.exp(ratios[-1] - ratios[0]))


def follow_shape(budget: tuple[int, int], shape: tuple[int, int], step: int) -> tuple[int, int]:
    """The input size that has an image's shape and as many positions as a given one.

    Of all grids with at most 3 % more positions than the budget and at least 85 % of them, the one whose sides come
    nearest to the image's ratio; among equals the one with more positions. Squares stay squares.

    Args:
        budget: (height, width) in pixels; the input gets about as many positions.
        shape: (height, width) of the image, in any unit.
        step: pixels of one position along each side, the patch size.

    Returns:
        (height, width) in pixels, multiples of `step`.
    """
    positions = (budget[0] // step) * (budget[1] // step)
    ratio = min(max(shape[0] / shape[1], 1 / _MOST), _MOST)
    most = math.floor(positions * 1.03)
    best, best_key = (budget[0] // step, budget[1] // step), (math.inf, 0.0)
    for rows in range(1, most + 1):
        for columns in {math.floor(rows / ratio), math.ceil(rows / ratio)}:
            count = rows * columns
            if columns < 1 or not 0.85 * positions <= count <= most:
                continue
            # Half a percent of distortion matters less than a position lost.
            key = (round(abs(math.log(rows / columns / ratio)), 2), -float(count))
            if key < best_key:
                best, best_key = (rows, columns), key
    return best[0] * step, best[1] * step
