"""Reference frames in a bundle: a few images with the results of the PyTorch model, so that any machine can verify.

Each frame is an 8-bit PNG of the graph's frame size in `samples/`, which `saae-run` scores like any folder. Its map is
a 16-bit PNG in `reference/`, scaled to its range (an error of 1/131070 of it, far below every parity bound). Names,
scores and ranges are JSON. Reading them needs no PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleCorruptError, ImageError
from .files import write_json
from .images import open_image, read_image

__all__ = ["FOLDER", "SAMPLES", "ReferenceFrame", "plain_name", "read_reference", "write_reference"]

FOLDER = "reference"
SAMPLES = "samples"
_INDEX = "reference.json"
_LEVELS = 65535
_LONGEST = 80  # letters of an image's name in a file's name; file systems take 255 bytes


@dataclass(frozen=True)
class ReferenceFrame:
    """One frame and the reference's results.

    Attributes:
        name: the image's file name.
        frame: uint8 H x W x 3, of the graph's frame size.
        anomaly_map: float32 H x W.
        score: image score.
    """

    name: str
    frame: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    score: float


def plain_name(text: str) -> str:
    """Text as part of a file's name on any system: letters and digits, of limited length."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)[:_LONGEST]


def write_reference(folder: Path, frames: Sequence[ReferenceFrame], against: str) -> None:
    """Write `samples/` and `reference/` into an unfinished bundle, if there are frames.

    Args:
        folder: the bundle's folder.
        frames: a few frames; fewer make a smaller bundle.
        against: description of what gave the results ("PyTorch FP32").
    """
    from PIL import Image

    if not frames:
        return
    place, samples = folder / FOLDER, folder / SAMPLES
    place.mkdir()
    samples.mkdir()
    entries = []
    for number, item in enumerate(frames):
        low, high = float(item.anomaly_map.min()), float(item.anomaly_map.max())
        span = (high - low) or 1.0
        levels = np.rint((item.anomaly_map.astype(np.float64) - low) * (_LEVELS / span)).astype(np.uint16)
        plain = plain_name(Path(item.name).stem)
        frame, anomaly_map = f"{SAMPLES}/{number}-{plain}.png", f"{FOLDER}/{number}-{plain}.map.png"
        Image.fromarray(item.frame).save(folder / frame, optimize=False)
        Image.fromarray(levels).save(folder / anomaly_map, optimize=False)
        entries.append(
            {
                "name": item.name,
                "frame": frame,
                "map": anomaly_map,
                "low": low,
                "high": high,
                "score": item.score,
            }
        )
    write_json(place / _INDEX, {"against": against, "frames": entries})


def read_reference(bundle: Bundle) -> tuple[list[ReferenceFrame], str]:
    """The reference frames of an opened bundle, and what gave their results; no frames if it holds none.

    Raises:
        BundleCorruptError: the index or a file is damaged.
    """
    name = f"{FOLDER}/{_INDEX}"
    if name not in bundle.manifest.files:
        return [], ""
    try:
        index: Any = json.loads(bundle.file(name).read_text(encoding="utf-8"))
        frames = [_read(bundle, entry) for entry in index["frames"]]
        return frames, str(index["against"])
    except (ValueError, KeyError, TypeError, OverflowError, OSError, MemoryError, ImageError, RecursionError) as error:
        raise BundleCorruptError(
            f"{bundle.path}: {name} cannot be read.",
            f"{type(error).__name__}: {error}",
            "copy the bundle again, or rebuild it: saae-export build",
        ) from error


def _read(bundle: Bundle, entry: Any) -> ReferenceFrame:
    frame = read_image(bundle.file(str(entry["frame"])))
    with open_image(bundle.file(str(entry["map"]))) as image:
        levels = np.asarray(image).astype(np.float64)
    low, high = float(entry["low"]), float(entry["high"])
    anomaly_map = (low + levels * ((high - low) / _LEVELS)).astype(np.float32)
    if not np.isfinite(anomaly_map).all():
        raise ValueError(f"the map of {entry['name']} is not finite")
    if anomaly_map.shape != frame.shape[:2]:
        raise ValueError(f"the map of {entry['name']} has another size than its frame")
    return ReferenceFrame(str(entry["name"]), frame, anomaly_map, float(entry["score"]))
