"""Near-copies: images of a burst or a video, where neighbours are more alike than any two images of the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from saae_runtime.geometry import resize_frames

from .category import Sample

__all__ = ["sequence_reach"]

_THUMB = (32, 32)
_LEAST = 12
"""Images below which neighbours cannot be told from chance."""

_ALIKE = 0.7
"""Neighbours whose median distance is below this share of that of random pairs are near-copies."""

_APART = 0.9
"""Images are far enough apart in the order if their median distance reaches this share."""

_MOST = 5
"""At most one image in this many is left out on each side."""


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
    thumbs = np.empty((count, 3 * _THUMB[0] * _THUMB[1]), np.float32)
    for number, sample in enumerate(samples):
        if progress is not None:
            progress(number, count)
        thumbs[number] = resize_frames(sample.read(), _THUMB).reshape(-1)
    thumbs -= thumbs.mean(axis=1, keepdims=True)  # a lamp that drifts makes no two parts alike
    energy = (thumbs**2).sum(axis=1)
    distance = np.sqrt(np.maximum(energy[:, None] + energy - 2 * thumbs @ thumbs.T, 0.0))
    usual = float(np.median(distance[np.triu_indices(count, 1)]))
    if usual == 0.0 or float(np.median(np.diagonal(distance, 1))) >= _ALIKE * usual:
        return 0
    for reach in range(1, count // _MOST):
        if float(np.median(np.diagonal(distance, reach + 1))) >= _APART * usual:
            return reach
    return count // _MOST
