"""Resize and upsample: the one definition that training, the exported graph and the runtime share.

Both are separable and linear, so each is a pair of constant matrices, y = Rh @ x @ Rw^T. Inside the fused graph they
are two matrix products, which every inference library computes alike, unlike an ONNX Resize with antialias.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

__all__ = ["gaussian_matrix", "resize_frames", "resize_matrix", "upsample_map", "upsample_matrix"]

_BAND = 16  # outputs of one block of an upsampling
_WORTH_BANDS = 1 << 18  # pixels of a frame from which bands on threads are faster

_KEPT = 64 << 20  # bytes of matrices that each function below caches
_BLOCK_OVERHEAD = 512  # bytes that a block takes beside its weights

_Band = tuple[tuple[int, int], tuple[int, int]]
_Blocks = tuple[tuple[slice, slice, NDArray[np.float32]], ...]
_Arguments = ParamSpec("_Arguments")
_Kept = TypeVar("_Kept")


def _kept(
    size: Callable[[_Kept], int], limit: int = _KEPT
) -> Callable[[Callable[_Arguments, _Kept]], Callable[_Arguments, _Kept]]:
    """Cache a function's results up to `limit` bytes, dropping the least recently used first.

    Limited by bytes, because 64 matrices of a line-scan camera's frames are gigabytes.
    """

    def decorate(make: Callable[_Arguments, _Kept]) -> Callable[_Arguments, _Kept]:
        made: OrderedDict[object, _Kept] = OrderedDict()
        taken = 0
        lock = threading.Lock()

        @functools.wraps(make)
        def get(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Kept:
            nonlocal taken
            key = (arguments, tuple(sorted(named.items())))
            with lock:
                if key in made:
                    made.move_to_end(key)
                    return made[key]
            value = make(*arguments, **named)
            with lock:
                if key not in made and size(value) <= limit:
                    made[key] = value
                    taken += size(value)
                    while taken > limit:
                        taken -= size(made.popitem(last=False)[1])
            return value

        return get

    return decorate


def _array_bytes(matrix: NDArray[np.float32]) -> int:
    return matrix.nbytes


def _blocks_bytes(blocks: _Blocks) -> int:
    return sum(weights.nbytes + _BLOCK_OVERHEAD for _, _, weights in blocks)


@_kept(_array_bytes)
def resize_matrix(n_in: int, n_out: int) -> NDArray[np.float32]:
    """Antialiased bilinear resize along one axis, like Pillow's BILINEAR filter.

    The triangle filter is widened by the scale when shrinking; each row is normalised to sum to one.

    Args:
        n_in: pixels before.
        n_out: pixels after.

    Returns:
        float32 matrix of shape n_out x n_in (read-only; shared between callers).

    Raises:
        ConfigError: a size below one.
    """
    _check(n_in, n_out)
    scale = n_in / n_out
    support = max(scale, 1.0)
    matrix = np.zeros((n_out, n_in), np.float32)
    for row in range(n_out):
        center = (row + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), n_in)
        weights = 1.0 - np.abs(np.arange(first, last) + 0.5 - center) / support
        weights = np.maximum(weights, 0.0)
        matrix[row, first:last] = weights / weights.sum()
    return _frozen(matrix)


@_kept(_array_bytes)
def upsample_matrix(n_in: int, n_out: int) -> NDArray[np.float32]:
    """Bilinear upsampling along one axis, half-pixel centres (torch's `align_corners=False`).

    Args:
        n_in: values before.
        n_out: values after.

    Returns:
        float32 matrix of shape n_out x n_in (read-only; shared between callers).

    Raises:
        ConfigError: a size below one.
    """
    _check(n_in, n_out)
    left, right, share = _taps(n_in, n_out)
    matrix = np.zeros((n_out, n_in), np.float32)
    rows = np.arange(n_out)
    np.add.at(matrix, (rows, left), 1.0 - share)
    np.add.at(matrix, (rows, right), share)
    return _frozen(matrix)


def _taps(n_in: int, n_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The two values that each output of a bilinear upsampling lies between, and the share of the second."""
    position = np.maximum((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0.0)
    left = np.minimum(position.astype(np.int64), n_in - 1)
    right = np.minimum(left + 1, n_in - 1)
    return left, right, np.where(left == right, 0.0, position - left)


@_kept(_array_bytes)
def gaussian_matrix(n: int, sigma: float) -> NDArray[np.float32]:
    """Gaussian smoothing along one axis of `n` values; rows are renormalised at the borders.

    Args:
        n: number of values.
        sigma: standard deviation in values; 0 gives the identity.

    Returns:
        float32 matrix of shape n x n (read-only; shared between callers).

    Raises:
        ConfigError: `n` below one, or `sigma` negative.
    """
    _check(n, n)
    if not sigma >= 0:
        raise ConfigError(f"Smoothing of {sigma} is not possible.", "It is a standard deviation.", "give 0 or more")
    if sigma == 0:
        return _frozen(np.eye(n))
    offset = np.arange(n)[:, None] - np.arange(n)[None, :]
    matrix = np.exp(-0.5 * (offset / sigma) ** 2)
    return _frozen(matrix / matrix.sum(axis=1, keepdims=True))


def resize_frames(
    frames: NDArray[np.uint8],
    size: tuple[int, int],
    bands: int = 1,
    run: Callable[[Callable[[_Band], NDArray[np.uint8]], Iterable[_Band]], Iterable[NDArray[np.uint8]]] = map,
) -> NDArray[np.uint8]:
    """Resize frames on the host: Pillow's antialiased bilinear filter, rounded to 8 bits.

    Equal to `resize_matrix` on both axes to within Pillow's rounding (at most one grey level).

    Args:
        frames: uint8, H x W x 3 or N x H x W x 3. A gray frame that is shown as three channels without a copy
            (`np.broadcast_to`) is resized once, and comes back in the same form.
        size: (height, width) after.
        bands: number of bands of rows for a large frame, if they have whole numbers of rows before and after; the
            result is the same.
        run: computes the bands: `map`, or the `map` of a thread pool (Pillow releases Python's lock).

    Returns:
        uint8 of the same rank; the input itself if it has that size already.
    """
    height, width = size
    _check(height, width)
    if frames.shape[-3:-1] == (height, width):
        return frames
    from PIL import Image

    if frames.ndim == 4:
        return np.stack([resize_frames(frame, size, bands, run) for frame in frames])
    gray = frames.strides[2] == 0 and frames.shape[2] == 3
    image = Image.fromarray(np.ascontiguousarray(frames[:, :, 0] if gray else frames))

    def resize(band: _Band) -> NDArray[np.uint8]:
        (top, bottom), (first, last) = band
        rows = (width, last - first)
        return np.asarray(image.resize(rows, Image.Resampling.BILINEAR, (0, top, image.width, bottom)))

    cuts = _cuts(image.height, height, bands if image.width * image.height >= _WORTH_BANDS else 1)
    resized = resize(cuts[0]) if len(cuts) == 1 else np.concatenate(list(run(resize, cuts)))
    return np.broadcast_to(resized[:, :, None], (height, width, 3)) if gray else resized


def upsample_map(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear upsampling of anomaly maps (paper section 3.3), align_corners=False.

    Args:
        maps: float32, h x w or N x h x w.
        size: (height, width) after.

    Returns:
        float32 of the same rank.
    """
    height, width = size
    if maps.shape[-2:] == (height, width):
        return maps
    rows = _bands(maps.shape[-2], height)
    columns = _bands(maps.shape[-1], width)
    upsampled = np.empty((*maps.shape[:-2], height, width), np.float32)
    wide = np.empty((maps.shape[-2], width), np.float32)
    for small, large in zip(_as_batch(maps), _as_batch(upsampled), strict=True):
        for to, taken, weights in columns:
            np.matmul(small[:, taken], weights.T, out=wide[:, to])
        for to, taken, weights in rows:
            np.matmul(weights, wide[taken], out=large[to])
    return upsampled


@_kept(_blocks_bytes)
def _bands(n_in: int, n_out: int) -> _Blocks:
    """`upsample_matrix` as small blocks that hold all of its non-zeros: (outputs, inputs, weights).

    A row has only two non-zeros, so the full matrix is never made. Products of small blocks are also below the size at
    which BLAS uses threads, which would compete with the inference library.
    """
    _check(n_in, n_out)
    left, right, share = _taps(n_in, n_out)
    bands = []
    for start in range(0, n_out, _BAND):
        stop = min(start + _BAND, n_out)
        first = int(left[start])
        taken = slice(first, int(right[stop - 1]) + 1)
        weights = np.zeros((stop - start, taken.stop - first), np.float32)
        rows = np.arange(stop - start)
        np.add.at(weights, (rows, left[start:stop] - first), 1.0 - share[start:stop])
        np.add.at(weights, (rows, right[start:stop] - first), share[start:stop])
        bands.append((slice(start, stop), taken, weights))
    return tuple(bands)


def _as_batch(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    return maps.reshape(-1, *maps.shape[-2:]) if maps.ndim != 3 else maps


def _cuts(n_in: int, n_out: int, most: int) -> list[_Band]:
    """Up to `most` bands of about the same height: ((first row, end) before, (first row, end) after)."""
    steps = math.gcd(n_in, n_out)  # positions where a row begins both before and after
    count = max(min(most, steps), 1)
    at = [steps * number // count for number in range(count + 1)]
    before, after = n_in // steps, n_out // steps
    return [((a * before, b * before), (a * after, b * after)) for a, b in pairwise(at)]


def _check(n_in: int, n_out: int) -> None:
    if n_in < 1 or n_out < 1:
        raise ConfigError(f"A resize from {n_in} to {n_out} pixels is not possible.", "Sizes start at one.", "")


def _frozen(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    result = matrix.astype(np.float32, copy=False)
    result.setflags(write=False)
    return result
