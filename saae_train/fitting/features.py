"""Features of a list of images: extracted once, cached on disk, resumed after a kill, read from disk if large."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saae_runtime.errors import FitError, StorageError
from saae_runtime.files import canonical_json, sha256_bytes, storage_error, write_json
from saae_runtime.geometry import resize_frames
from saae_runtime.locks import turn
from saae_runtime.progress import Progress, silent

from ..data.category import Sample
from ..data.split import content_digest
from ..model.vit import Features
from .precision import arithmetic, matmul_precision

__all__ = ["FeatureSet", "cache_root", "extract", "pick_device"]

_BATCH = 8
_PATIENCE = 1.0  # seconds between two looks at how far another process is


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images.

    Attributes:
        values: float16, N x L x U, memory-mapped: only what is read is loaded.
        key: sha256 of everything that they depend on.
    """

    values: NDArray[np.float16]
    key: str

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Images start..stop as float32, n x L x U."""
        return torch.from_numpy(np.asarray(self.values[start:stop], dtype=np.float32))


def cache_root() -> Path:
    """Where features are kept: $SAAE_CACHE, else saae below the user's cache folder."""
    for name, below in (("SAAE_CACHE", ""), ("XDG_CACHE_HOME", "saae")):
        if os.environ.get(name):
            return Path(os.environ[name], below)
    return Path.home() / ".cache" / "saae"


def pick_device(name: str | None = None) -> torch.device:
    """The requested device, or the first CUDA GPU, or the CPU. Raises FitError if it is missing."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FitError(f"Device {chosen!r} cannot be used.", str(error).splitlines()[0], "use --device cpu") from error
    return device


def feature_key(backbone: Features, samples: Sequence[Sample], kind: str) -> str:
    """Cache key: backbone, weights, layers, geometry, precision, and every image's bytes in order.

    Args:
        backbone, samples: as for `extract`.
        kind: `bf16`, `tf32` or `fp32`, see `saae_train.fitting.precision.arithmetic`.
    """
    return sha256_bytes(
        canonical_json(
            {
                "format": 2,  # how images are read: raise it when the same file gives other pixels
                "backbone": backbone.name,
                "weights": backbone.weights.sha256,
                "layers": backbone.layers,
                "input_size": backbone.input_size,
                "bf16": kind == "bf16",
                **({"tf32": True} if kind == "tf32" else {}),
                **_tiles(backbone),
                "images": content_digest(samples),
            }
        ).encode()
    )


def _tiles(backbone: Features) -> dict[str, Any]:
    if len(backbone.tiles) == 1:
        return {}
    return {"tiles": backbone.tiles.counts, "window": backbone.tiles.window}


def extract(
    backbone: Features,
    samples: Sequence[Sample],
    cache: Path | None = None,
    device: torch.device | None = None,
    precision: str = "auto",
    progress: Progress = silent,
) -> FeatureSet:
    """Features of `samples`, from the cache if possible.

    An interrupted extraction resumes where it stopped; one that another process has begun is waited for. Values are
    stored as float16, rounded once.

    Args:
        backbone: frozen features.
        samples: images, each of its own size.
        cache: folder to keep them in; default `cache_root()`.
        device: where to compute.
        precision: `auto`, `bf16`, `tf32` or `fp32`, see `FitConfig`.
        progress: called with (done, total).

    Raises:
        ImageError: an image cannot be read.
        FitError: features are not finite or too large for float16.
        StorageError: no room for the cache.
    """
    place = device or pick_device()
    kind = arithmetic(precision, place)
    key = feature_key(backbone, samples, kind)
    folder = (cache or cache_root()) / "features"
    shape = (len(samples), backbone.grid[0] * backbone.grid[1], backbone.channels)
    done_file, part_file, mark = folder / f"{key}.npy", folder / f"{key}.part", folder / f"{key}.json"
    lock = folder / f"{key}.lock"
    while (values := _whole(done_file, shape)) is None:
        with turn(lock, _PATIENCE) as alone:
            if not alone:  # another process computes them
                progress(_resume_at(part_file, mark), len(samples))
                continue
            if _whole(done_file, shape) is None:
                done_file.unlink(missing_ok=True)
                _room(part_file, int(np.prod(shape)) * 2)
                _fill(backbone, samples, part_file, mark, shape, place, kind, progress)
                part_file.replace(done_file)
                mark.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)  # those who wait for it find the features
    progress(len(samples), len(samples))
    return FeatureSet(values, key)


def _whole(file: Path, shape: tuple[int, int, int]) -> NDArray[np.float16] | None:
    """The finished features in a file; None if it is missing, truncated or not an array of this shape."""
    with suppress(FileNotFoundError, ValueError, EOFError):
        values: NDArray[np.float16] = np.load(file, mmap_mode="r")
        if values.shape == shape:
            return values
    return None


def _fill(
    backbone: Features,
    samples: Sequence[Sample],
    part_file: Path,
    mark: Path,
    shape: tuple[int, int, int],
    device: torch.device,
    kind: str,
    progress: Progress,
) -> None:
    try:
        values, start = _open_part(part_file, mark, shape)
    except OSError as error:
        part_file.unlink(missing_ok=True)
        raise storage_error(part_file, error) from error
    model = backbone.to(device)
    mean = torch.tensor(backbone.mean, device=device).view(3, 1, 1) * 255.0
    std = torch.tensor(backbone.std, device=device).view(3, 1, 1) * 255.0
    for first in range(start, len(samples), _BATCH):
        progress(first, len(samples))
        batch = samples[first : first + _BATCH]
        frames = np.stack([resize_frames(sample.read(), backbone.input_size) for sample in batch])
        x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()
        half = torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16")
        with torch.inference_mode(), matmul_precision(kind, device), half:
            f = model((x - mean) / std).float()
        if not bool(torch.isfinite(f).all()) or float(f.abs().max()) > 65000.0:
            raise FitError(
                f"Features of {batch[0].path} and the images after it are not usable.",
                "They are NaN, infinite or beyond the range of 16-bit numbers: the weights do not fit this model.",
                "use other weights or other layers",
            )
        values[first : first + len(batch)] = f.cpu().numpy().astype(np.float16)
        values.flush()
        write_json(mark, {"done": first + len(batch)})


def _open_part(part_file: Path, mark: Path, shape: tuple[int, int, int]) -> tuple[np.memmap[Any, Any], int]:
    """The unfinished file, and how many images it holds."""
    start = _resume_at(part_file, mark)
    if start:
        size = part_file.stat().st_size
        with suppress(ValueError):
            values = np.lib.format.open_memmap(part_file, "r+")
            # Opening a truncated file would fill it up with zeros: start again.
            if values.shape == shape and values.dtype == np.float16 and values.offset + values.nbytes == size:
                return values, start
    mark.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(part_file, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):
        # On a full disk, a mapped file with holes would kill the process instead of raising an error.
        with part_file.open("rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, part_file.stat().st_size)
    return values, 0


def _resume_at(part_file: Path, mark: Path) -> int:
    try:
        return int(json.loads(mark.read_text())["done"]) if part_file.exists() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _room(part_file: Path, needed: int) -> None:
    """Refuse to begin a file of `needed` bytes without room for what an interrupted one does not hold already."""
    folder = part_file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        held = getattr(part_file.stat(), "st_blocks", 0) * 512 if part_file.exists() else 0
    except OSError as error:
        raise storage_error(folder, error) from error
    missing = max(0, needed - held)
    if free < missing * 1.05:
        raise StorageError(
            f"The features need {missing / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left.",
            "They are computed once and kept on disk.",
            "free space, or set SAAE_CACHE to a folder with more room",
        )
