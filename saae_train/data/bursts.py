"""Near-copies: one picture saved twice, and images of a burst or a video, whose neighbours are unusually alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saae_runtime.geometry import resize_frames
from saae_runtime.images import read_image

from .category import Sample

__all__ = ["first_copies", "sequence_reach"]

_THUMB = (32, 32)
_LEAST = 12
"""Images below which neighbours cannot be told from chance."""

_ALIKE = 0.7
"""Neighbours whose median distance is below this share of that of random pairs are near-copies."""

_APART = 0.9
"""Images are far enough apart in the order if their median distance reaches this share."""

_MOST = 5
"""At most one image in this many is left out on each side."""

_COPY = 0.09
"""Two images are one picture if they differ by less than this share of what either differs from its fifth neighbour.

Of the first 30 and the first 100 images of four sets the nearest two differ by 0.11 (screws in almost one pose), copies
as JPEG of quality 90 by 0.075 at most, at half the size by 0.02 to 0.105.
"""

_OTHERS = 5


def first_copies(samples: Sequence[Sample]) -> list[int]:
    """For each image the index of the first one that shows the same picture, whatever its bytes; its own, usually.

    Saved again, in another format, a picture has other bytes. Where all images of a product are alike but for
    noise, none is a copy: a copy is nearer than the others by far.

    Args:
        samples: in any order.

    Raises:
        ImageError: an image cannot be read.
    """
    count = len(samples)
    first = list(range(count))
    if count < 3:
        return first
    distance = _distances(np.stack([_thumb_of(sample) for sample in samples]))
    np.fill_diagonal(distance, np.inf)
    place = min(_OTHERS, count - 1) - 1
    limit = _COPY * np.partition(distance, place, axis=1)[:, place]
    for one, other in zip(*np.nonzero(np.triu(distance < np.minimum.outer(limit, limit), 1)), strict=True):
        first[other] = min(first[other], first[one])
    return first


def sequence_reach(samples: Sequence[Sample], progress: Callable[[int, int], None] | None = None) -> int:
    """How far near-copies reach in the order of the images; 0 if neighbours are as different as any two.

    Image i and the images i - reach .. i + reach show one scene. To score image i as if it were new, leave all of
    them out.

    Args:
        samples: in the order of their names, as a folder lists them.
        progress: called with (done, total).

    Raises:
        ImageError: an image cannot be read.
    """
    count = len(samples)
    if count < _LEAST:
        return 0
    thumbs = []
    for number, sample in enumerate(samples):
        if progress is not None:
            progress(number, count)
        thumbs.append(_thumb_of(sample))
    distance = _distances(np.stack(thumbs))
    usual = float(np.median(distance[np.triu_indices(count, 1)]))
    if usual == 0.0 or float(np.median(np.diagonal(distance, 1))) >= _ALIKE * usual:
        return 0
    for reach in range(1, count // _MOST):
        if float(np.median(np.diagonal(distance, reach + 1))) >= _APART * usual:
            return reach
    return count // _MOST


def _distances(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Between all pairs, without each one's brightness: a lamp that drifts makes no two parts alike."""
    rows = thumbs.astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    energy = (rows**2).sum(axis=1)
    found: NDArray[np.float32] = np.sqrt(np.maximum(energy[:, None] + energy - 2 * rows @ rows.T, 0.0))
    return found


def _thumb_of(sample: Sample) -> NDArray[np.uint8]:
    facts = sample.path.stat()
    return _thumb(sample.path, sample.white_level, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=20_000)
def _thumb(path: Path, white_level: int | None, size: int, changed: int) -> NDArray[np.uint8]:
    """3 KB of an image, which is asked for several times; a new size or time makes it a new entry."""
    return resize_frames(read_image(path, white_level), _THUMB).reshape(-1)
