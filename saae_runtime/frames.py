"""Checks frames from callers and converts them to uint8 H x W x 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import geometry
from .errors import FrameError
from .images import to_eight_bits

__all__ = ["MOST_ASPECT", "MOST_PIXELS", "Frames", "Resize", "as_frames", "enough_memory", "to_batch"]

MOST_PIXELS = 1 << 30
"""Pixels of the largest frame: its map alone takes 4 GiB."""

MOST_ASPECT = 1024
"""Largest aspect ratio of a frame; a narrower one is unrecognisable after the resize."""

Frame = NDArray[np.uint8]
Resize = Callable[[Frame, tuple[int, int]], Frame]

_DTYPE_CURES = {
    "f": "if the values are 0..1: (frame * 255).round().astype(np.uint8); if they are 0..255: frame.astype(np.uint8)",
    "u": "open the engine with the camera's white level: Engine(bundle, white_level=4095) for 12 bits",
    "i": "frame.astype(np.uint8), if the values are 0..255",
    "b": "frame.astype(np.uint8) * 255",
}


@dataclass(frozen=True)
class Frames:
    """Checked frames: `items` are uint8 H x W x 3 each; `single`: whether the caller gave one frame, not a batch."""

    items: tuple[Frame, ...]
    single: bool


def as_frames(value: Any, white_level: int | None = None) -> Frames:
    """Check frames and show gray ones as three channels, without a copy.

    Args:
        value: uint8 H x W, H x W x 1 or H x W x 3 (RGB): one frame; N x H x W x 1 or N x H x W x 3: a batch; a list or
            tuple of single frames, sizes may differ. Arrays need not be contiguous. Other values that numpy can
            read (`__array_interface__`, `__array__`) count as arrays.
        white_level: with it, uint16 frames are accepted as well and scaled by `images.to_eight_bits`.

    Raises:
        FrameError: another dtype or shape; the message names both and says how to convert.
    """
    if isinstance(value, (list, tuple)):
        items = [_frame(item, f"Frame {index} of the list", white_level) for index, item in enumerate(value)]
        return Frames(tuple(items), single=False)
    array = _scaled(_array(value, "The frame"), white_level)
    if array.ndim == 4:
        _check(array, "The batch", array.shape[3], array.shape[1:3] if array.shape[0] else (1, 1))
        return Frames(tuple(_rgb(frame) for frame in array), single=False)
    return Frames((_frame(array, "The frame", white_level),), single=True)


def to_batch(frames: Sequence[Frame], size: tuple[int, int], resize: Resize = geometry.resize_frames) -> Frame:
    """One contiguous batch at the graph's size; frames of a different size are resized.

    Args:
        frames: uint8 H x W x 3 each.
        size: (height, width) of the graph's input.
        resize: `geometry.resize_frames`, perhaps with options.

    Returns:
        uint8 N x height x width x 3, C-contiguous; the frame's own memory if N is 1 and nothing has to change.
    """
    height, width = size
    if len(frames) == 1:
        return np.ascontiguousarray(resize(frames[0], size))[None]
    batch = np.empty((len(frames), height, width, 3), np.uint8)
    for slot, frame in zip(batch, frames, strict=True):
        slot[...] = resize(frame, size)
    return batch


@contextmanager
def enough_memory(frames: Sequence[Frame] | Sequence[tuple[int, int]]) -> Iterator[None]:
    """Within the block, turn a MemoryError into an error of these frames, given as arrays or as their (height, width).

    Raises:
        FrameError: in place of a MemoryError.
    """
    try:
        yield
    except MemoryError as error:
        sizes = [frame.shape[:2] if isinstance(frame, np.ndarray) else frame for frame in frames]
        height, width = max(sizes, key=lambda size: size[0] * size[1])
        many = "" if len(sizes) == 1 else f" ({len(sizes)} frames at once)"
        raise FrameError(
            f"There is not enough memory to score a frame of {height} x {width} pixels{many}.",
            str(error) or "The system has no more.",
            "score smaller frames or fewer at once (max_batch=1), or close other programs",
        ) from error


def _array(value: Any, name: str) -> NDArray[Any]:
    try:
        array = _read(value, name)
    except (FrameError, MemoryError):
        raise
    except Exception as error:  # the value's own code runs here and may raise anything
        raise FrameError(
            f"{name} ({type(value).__name__}) cannot be read as an array.",
            f"{type(error).__name__}: {error}",
            "copy it to the host first, as a numpy array of uint8",
        ) from error
    if isinstance(array, np.ma.MaskedArray):
        return _unmasked(array, name)
    return array


def _read(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if str(type(value).__module__).partition(".")[0] == "PIL":
        raise FrameError(
            f"{name} is a PIL image, not an array.",
            "Its mode may mean palette indices, alpha or CMYK.",
            "np.asarray(image.convert('RGB')), or read the file with saae_runtime.images.read_image",
        )
    if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        raise FrameError(
            f"{name} is a path, not an array.",
            "An engine takes pixels.",
            "read the file with saae_runtime.images.read_image",
        )
    if not any(hasattr(value, attribute) for attribute in ("__array_interface__", "__array__", "__array_struct__")):
        raise FrameError(f"{name} is a {type(value).__name__}, not an array.", "", "give a numpy array of uint8")
    return np.asarray(value)


def _unmasked(array: Any, name: str) -> NDArray[Any]:
    """The pixels of a masked array without masked values; others are refused, because masked pixels would be judged."""
    masked = int(np.ma.getmaskarray(array).sum())
    if masked:
        raise FrameError(
            f"{name} is a masked array, with {masked} of {array.size} values masked.",
            "Masked pixels would be judged like the rest.",
            "fill it with what the good images have there: frame.filled(value)",
        )
    return np.asarray(array.data)


def _scaled(array: NDArray[Any], white_level: int | None) -> NDArray[Any]:
    return to_eight_bits(array, white_level) if white_level is not None and array.dtype == np.uint16 else array


def _frame(value: Any, name: str, white_level: int | None) -> Frame:
    array = _scaled(_array(value, name), white_level)
    if array.ndim == 2:
        _check(array, name, 1, array.shape)
    elif array.ndim == 3:
        _check(array, name, array.shape[2], array.shape[:2])
    else:
        raise _shape_error(array, name)
    return _rgb(array)


def _check(array: NDArray[Any], name: str, channels: int, size: tuple[int, ...]) -> None:
    if array.dtype != np.uint8:
        raise FrameError(
            f"{name} has dtype {array.dtype} (shape {array.shape}); frames are uint8.",
            "The white level of other types is a guess, and a wrong guess shifts every score.",
            _DTYPE_CURES.get(array.dtype.kind, "give a numpy array of uint8"),
        )
    if channels not in (1, 3):
        raise _shape_error(array, name)
    if min(size) < 1:
        raise FrameError(f"{name} is empty: shape {array.shape}.", "A side has no pixels.", "check the camera's crop")
    if size[0] * size[1] > MOST_PIXELS:
        raise FrameError(
            f"{name} has {size[0] * size[1]} pixels (shape {array.shape}); a frame has at most {MOST_PIXELS}.",
            "All of it is resized to the graph's input, so that small defects would be lost.",
            "cut it into parts and score each as a frame",
        )
    if max(size) > MOST_ASPECT * min(size):
        raise FrameError(
            f"{name} is {size[0]} x {size[1]} pixels; one side is more than {MOST_ASPECT} times the other.",
            "It would be squeezed into the graph's input, where nothing could be recognised.",
            "cut it into parts of the training images' proportions, or collect more lines of the camera in a frame",
        )


def _shape_error(array: NDArray[Any], name: str) -> FrameError:
    shape = array.shape
    cure = "give H x W, H x W x 1 or H x W x 3; a batch is N x H x W x 3 (or x 1), or a list of frames"
    if array.ndim in (3, 4):
        if shape[-3] in (1, 3):
            axes = "(1, 2, 0)" if array.ndim == 3 else "(0, 2, 3, 1)"
            cure = f"the channels come last: frame.transpose{axes}"
        elif shape[-1] == 4:
            cure = "drop the alpha channel: frame[..., :3]"
        elif shape[-1] == 2:
            cure = "keep the gray channel: frame[..., 0]"
        elif array.ndim == 3:
            cure = "a batch of gray frames is N x H x W x 1: frames[..., None]; or give a list of H x W frames"
    return FrameError(f"{name} has shape {shape} (dtype {array.dtype}).", "Frames have one or three channels.", cure)


def _rgb(array: NDArray[np.uint8]) -> Frame:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    return array
