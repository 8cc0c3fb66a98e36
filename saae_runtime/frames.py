"""Frames as callers give them, checked and brought to uint8 H x W x 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import geometry
from .errors import FrameError
from .images import to_eight_bits

__all__ = ["Frames", "Resize", "as_frames", "to_batch"]

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
    """Checked frames: `items` are uint8 H x W x 3 each; `single`: the caller gave one frame, not a batch."""

    items: tuple[Frame, ...]
    single: bool


def as_frames(value: Any, white_level: int | None = None) -> Frames:
    """Checks frames and shows gray ones as three channels, without a copy.

    Args:
        value: uint8 H x W, H x W x 1 or H x W x 3 (RGB): one frame; N x H x W x 1 or N x H x W x 3: a batch; a list or
            tuple of single frames, sizes may differ. Arrays need not be contiguous. Anything else that numpy reads
            without guessing (`__array_interface__`, `__array__`) counts as an array.
        white_level: with it, uint16 frames are taken as well and scaled by `images.to_eight_bits`.

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
    """One contiguous batch at the graph's size; frames of another size are resized.

    Args:
        frames: uint8 H x W x 3 each.
        size: (height, width) of the graph's input.
        resize: `geometry.resize_frames`, or that with its options chosen.

    Returns:
        uint8 N x height x width x 3, C-contiguous; the frame's own memory where N is 1 and nothing has to change.
    """
    height, width = size
    if len(frames) == 1:
        return np.ascontiguousarray(resize(frames[0], size))[None]
    batch = np.empty((len(frames), height, width, 3), np.uint8)
    for slot, frame in zip(batch, frames, strict=True):
        slot[...] = resize(frame, size)
    return batch


def _array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.partition(".")[0] == "PIL":
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
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FrameError(
            f"{name} ({type(value).__name__}) cannot be read as an array.",
            str(error),
            "copy it to the host first, as a numpy array of uint8",
        ) from error


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
