"""A fitted model on disk: config.json and model.safetensors, self-contained, hash-checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saae_runtime.errors import CheckpointError, SaaeError, StorageError
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file, write_json
from saae_runtime.folders import atomic_directory, put_back
from saae_runtime.shell import shell_line
from saae_runtime.version import saae_version

from ..config import FitConfig
from ..record import FitRecord
from .detector import Detector, FeatureSpace
from .left_out import LeftOut
from .memory import Memory
from .saae import SAAE
from .tensors import write_tensors
from .vit import Features, bare_backbone
from .weights import WeightsInfo

__all__ = [
    "Checkpoint",
    "check_target",
    "discard_state",
    "load_checkpoint",
    "read_fit_config",
    "read_fit_record",
    "save_checkpoint",
]

SCHEMA = 5
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_LEFT_OUT = "left_out.scores"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A fitted model and the record of its fit.

    Attributes:
        detector: the model, in evaluation mode, on the CPU.
        config: the configuration it was fitted with (layers and latent resolved).
        category: product name.
        record: how it was fitted.
        left_out: scores of the fitted images, each as if it were new; None without a memory.
        state: folder that the fit can be resumed from until the model is saved; not saved itself.
    """

    detector: Detector
    config: FitConfig
    category: str
    record: FitRecord = field(default_factory=FitRecord)
    state: Path | None = field(default=None, compare=False)
    left_out: LeftOut | None = None


def check_target(path: str | os.PathLike[str]) -> Path:
    """Check before a fit that a checkpoint can be written to a folder.

    Raises:
        StorageError: the place is taken by a file, or by a folder with something else.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file.", "A folder must be written there.", "choose another with --out")
    if folder.is_dir() and any(folder.iterdir()) and not _is_checkpoint(folder):
        raise StorageError(
            f"{folder} holds something that is not a checkpoint.", "It would be replaced.", "choose another with --out"
        )
    return folder


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder may be replaced by a checkpoint: it holds one, not another library's config.json."""
    try:
        record: Any = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a damaged one is ours if the folder holds nothing else
        return {entry.name for entry in folder.iterdir()} <= {_CONFIG, _WEIGHTS}
    return isinstance(record, Mapping) and "saae_version" in record


def discard_state(checkpoint: Checkpoint) -> None:
    """Delete the resumable state of a fit, once its model is saved or not needed."""
    if checkpoint.state is not None:
        shutil.rmtree(checkpoint.state, ignore_errors=True)


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write a checkpoint folder atomically; the backbone's used weights are in it, so it needs nothing else.

    The resumable state of the fit is removed afterwards.

    Raises:
        StorageError: the disk is full, the place may not be written to, or a folder with something else is there.
    """
    folder = check_target(path)
    detector = checkpoint.detector
    tensors = detector.state_dict()
    if checkpoint.left_out is not None:
        tensors[_LEFT_OUT] = checkpoint.left_out.scores
    with atomic_directory(folder) as temporary:
        write_tensors(temporary / _WEIGHTS, tensors)
        record = _record(checkpoint) | {"sha256": sha256_file(temporary / _WEIGHTS)}
        record = json.loads(json.dumps(record, allow_nan=False))  # as it will be read
        write_json(temporary / _CONFIG, record | {"digest": _digest(record)})
    discard_state(checkpoint)
    return folder


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint folder and check its hash, its keys and that every weight is finite.

    Raises:
        CheckpointError: missing, damaged, of a newer version, or holding NaN.
    """
    folder = Path(path)
    put_back(folder)
    record = _read_config(folder)
    weights = folder / _WEIGHTS
    if not weights.is_file() or sha256_file(weights) != record.get("sha256"):
        raise CheckpointError(
            f"{weights} is damaged or missing.", f"Its sha256 is not the one in {_CONFIG}.", "fit again: saae-train fit"
        )
    try:
        tensors: dict[str, Tensor] = load_file(weights)
        detector, config = _build(record)
        if detector.memory is not None and record["schema"] < 5:  # older scores do not regard the image's level
            tensors["memory.beta"] = torch.tensor(0.0)
        scores, told = tensors.pop(_LEFT_OUT, None), record.get("left_out")
        left_out = None
        if told is not None and scores is not None:
            left_out = LeftOut(scores, tuple(told["names"]), int(told["reach"]), tuple(told.get("hashes", ())))
        fit_record = FitRecord.from_json(record["facts"])
        detector.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, SaaeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded.", f"{type(error).__name__}: {error}", "fit again: saae-train fit"
        ) from error
    bad = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"{folder} holds NaN or infinite weights.",
            f"e.g. {bad[0]}; such a model calls everything normal.",
            "fit again with a lower --learning-rate or --fit-precision fp32",
        )
    return Checkpoint(detector.eval(), config, str(record["category"]), fit_record, left_out=left_out)


def read_fit_config(path: str | os.PathLike[str]) -> FitConfig:
    """The configuration of the model in a checkpoint folder, without its weights.

    Raises:
        CheckpointError: missing, damaged or of a newer version.
    """
    return _described(path, lambda record: FitConfig.from_json(record["config"]))


def read_fit_record(path: str | os.PathLike[str]) -> FitRecord:
    """How the model in a checkpoint folder was fitted, without its weights.

    Raises:
        CheckpointError: missing, damaged or of a newer version.
    """
    return _described(path, lambda record: FitRecord.from_json(record["facts"]))


def _described(path: str | os.PathLike[str], part: Callable[[dict[str, Any]], _T]) -> _T:
    """A part of the description of the model in a checkpoint folder. Raises CheckpointError."""
    folder = Path(path)
    put_back(folder)
    record = _read_config(folder)
    try:
        return part(record)
    except (KeyError, TypeError, ValueError, SaaeError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded.", f"{type(error).__name__}: {error}", "fit again: saae-train fit"
        ) from error


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    detector = checkpoint.detector
    backbone, saae = detector.backbone, detector.saae
    return {
        "schema": SCHEMA,
        "saae_version": saae_version(),
        "category": checkpoint.category,
        "config": checkpoint.config.to_json(),
        "backbone": {
            "name": backbone.name,
            "weights_source": backbone.weights.source,
            "weights_sha256": backbone.weights.sha256,
            "layers": list(backbone.layers),
            "input_size": list(backbone.input_size),
            **_tiles(backbone),
        },
        "space": {
            "components": None if detector.space.basis is None else detector.space.channels,
            "channels": backbone.channels,
        },
        "memory": None
        if detector.memory is None
        else {"entries": len(detector.memory), "search": detector.memory.search},
        "left_out": None
        if checkpoint.left_out is None
        else {
            "names": list(checkpoint.left_out.names),
            "reach": checkpoint.left_out.reach,
            "hashes": list(checkpoint.left_out.hashes),
        },
        "saae": {
            "channels": saae.channels,
            "latent": saae.latent,
            "positions": saae.positions,
            "mlp_size": saae.mlp_size,
            "transformer": saae.transformer,
            "grid": list(saae.grid),
            "patch": saae.patch,
        },
        "facts": checkpoint.record.to_json(),
    }


def _tiles(backbone: Features) -> dict[str, Any]:
    if len(backbone.tiles) == 1:
        return {}
    window = [side * backbone.patch for side in backbone.tiles.window]
    return {"tiles": list(backbone.tiles.counts), "window": window}


def _digest(record: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical_json({key: value for key, value in record.items() if key != "digest"}).encode())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        record: Any = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        schema = int(record["schema"])
    except FileNotFoundError:
        raise CheckpointError(
            f"No checkpoint at {folder}.",
            f"There is no {_CONFIG} in it.",
            shell_line("saae-train", "fit", "--normal", "FOLDER_OF_GOOD_PICTURES", "--out", folder),
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / _CONFIG} is not a checkpoint's description.", str(error), "fit again: saae-train fit"
        ) from error
    if schema > SCHEMA:
        raise CheckpointError(
            f"{folder} was written by a newer saae ({record.get('saae_version')}).", "", "pip install --upgrade saae"
        )
    if record.get("digest") != _digest(record):
        raise CheckpointError(
            f"{folder / _CONFIG} was changed or is damaged.", "Its digest does not fit.", "fit again: saae-train fit"
        )
    return dict(record)


def _build(record: Mapping[str, Any]) -> tuple[Detector, FitConfig]:
    """The detector's modules, without weights."""
    config = FitConfig.from_json(record["config"])
    about, saae, space = record["backbone"], record["saae"], record["space"]
    info = WeightsInfo(about["weights_source"], about["weights_sha256"])
    size, tiles = tuple(about.get("window", about["input_size"])), tuple(about.get("tiles", (1, 1)))
    backbone = bare_backbone(about["name"], about["layers"], size, info, tiles)
    channels, components = space["channels"], space["components"]
    basis = None if components is None else torch.zeros(channels, components)
    memory = None
    if (held := record.get("memory")) is not None:
        width = channels if components is None else components
        entries, search = held["entries"], held.get("search")  # older checkpoints search by all components
        memory = Memory(torch.zeros(entries, width), torch.ones(entries), torch.ones(width), search=search)
    detector = Detector(
        backbone,
        FeatureSpace(torch.zeros(channels), torch.ones(channels), basis),
        SAAE(**saae),
        config.score,
        config.smoothing,
        memory,
    )
    return detector, config
