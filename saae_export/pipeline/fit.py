"""The fit of a build: a given model, one of an earlier run, or a new one; and the split of the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file
from saae_runtime.progress import labelled
from saae_runtime.terminal import Stage, Stages
from saae_runtime.version import saae_version
from saae_train.config import TEXTURES, FitConfig
from saae_train.data.category import Category, Sample
from saae_train.data.split import Split, content_digest, content_hashes, split_for, split_of
from saae_train.fitting.backbone import backbone_for
from saae_train.fitting.fit import fit
from saae_train.fitting.loop import Reporter
from saae_train.model.checkpoint import Checkpoint, load_checkpoint, read_fit_record, save_checkpoint
from saae_train.model.weights import PACKAGED_NAME, packaged_path, refuse_random

from ..graph.half_weights import require_blocks
from ..int8.choose import require_frames
from .options import FitRequest

__all__ = ["FittedModel", "fit_model", "model_key", "refuse_fitted"]


@dataclass(frozen=True)
class FittedModel:
    """The model that a bundle is built from.

    Attributes:
        checkpoint: the model and how it was fitted.
        folder: the checkpoint's folder.
        split: the images that it was fitted on, and those to calibrate on.
    """

    checkpoint: Checkpoint
    folder: Path
    split: Split


def fit_model(request: FitRequest, category: Category, work: Path, stages: Stages) -> FittedModel:
    """Load the given model, reuse one of the same images and configuration, or fit one.

    Raises:
        CalibrationError: too few images for the ranges of INT8.
        SaaeError: an error of loading, fitting or saving.
    """
    with stages.stage("fit") as stage:
        if request.checkpoint is not None:
            model = _given_model(request.checkpoint, category, request.half_weights)
            if model.split.note:
                stages.say(f"  {model.split.note}", "yellow" if model.split.unseen else "bold yellow")
            _check_ranges(request, model.split)
            stage.note(f"taken from {request.checkpoint}")
            return model
        split = split_for(request.config, category)
        if split.note:
            stages.say(f"  {split.note}", "yellow")
        _check_ranges(request, split)
        weights = _weights(request, category)
        folder = work / "models" / model_key(request.config, category, split.fitting, weights, request.texture)
        if not request.refit and (folder / "config.json").is_file():
            try:
                checkpoint = load_checkpoint(folder)
            except SaaeError as error:
                stages.say(f"  {error.what} Fitting again.", "yellow")
            else:
                refuse_random(checkpoint.detector.backbone.weights.source, checkpoint.detector.backbone.name)
                stage.note(f"reused {folder}")
                return FittedModel(checkpoint, folder, split)
        checkpoint = _fit_new(request, category, split, weights, stages, stage)
        save_checkpoint(folder, checkpoint)
        stage.note(f"{len(split.fitting)} images" + (f", {len(split.held_out)} held out" if split.held_out else ""))
    return FittedModel(checkpoint, folder, split)


def model_key(
    config: FitConfig, category: Category, fitting: Sequence[Sample], weights: str | None, texture: bool | None
) -> str:
    """A name of a fitted model that depends on everything that it was fitted with."""
    shaped = {
        "saae": saae_version(),
        "config": config.to_json(),
        "images": content_digest(fitting),
        "weights": sha256_file(weights) if weights is not None and Path(weights).is_file() else weights,
        "category": category.name,
        "texture": category.name in TEXTURES if texture is None else texture,
    }
    return sha256_bytes(canonical_json(shaped).encode())[:16]


def _given_model(folder: Path, category: Category, half_weights: bool) -> FittedModel:
    checkpoint = load_checkpoint(folder)
    backbone = checkpoint.detector.backbone
    refuse_random(backbone.weights.source, backbone.name)
    if half_weights:
        require_blocks(backbone.name, backbone.layers)
    split = split_of(checkpoint.record, checkpoint.config, category)
    return FittedModel(dataclasses.replace(checkpoint, category=category.name), folder, split)


def refuse_fitted(checkpoint: Path, excluded: Sequence[Sample]) -> None:
    """Refuse to leave out images that a given model was fitted on: they would stay in it.

    Raises:
        ConfigError: the model was fitted on one of `excluded`.
        CheckpointError: there is no model, or a damaged one.
    """
    fitted = set(read_fit_record(checkpoint).fitted_on or ())
    inside = [sample for key, sample in zip(content_hashes(excluded), excluded, strict=True) if key in fitted]
    if inside:
        more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        raise ConfigError(
            f"{inside[0].path.name}{more} cannot be excluded from {checkpoint}.",
            "A model keeps what it was fitted on, and takes it for normal.",
            "leave --checkpoint out: the build then fits a model without it",
        )


def _check_ranges(request: FitRequest, split: Split) -> None:
    """Check before the fit that there are enough images for the ranges of INT8."""
    if request.int8:
        require_frames(len(split.fitting))


def _fit_new(
    request: FitRequest, category: Category, split: Split, weights: str | None, stages: Stages, stage: Stage
) -> Checkpoint:
    backbone = backbone_for(request.config, split.fitting, weights, lambda text: stages.say(f"  {text}", "yellow"))
    stage.note(f"weights: {backbone.weights.source}")
    return fit(
        backbone,
        split.fitting,
        request.config,
        category.name,
        device=request.device,
        cache=request.cache,
        texture=request.texture,
        reporter=Reporter(
            features=labelled(stage, "images, features"),
            steps=lambda done, total, loss: stage(done, total, f"steps, loss {loss:.4f}"),
            memory=stage,
            say=lambda text: stages.say(f"  {text}"),
        ),
        held_out=split.held_out,
        synthetic=category.synthetic,
    )


def _weights(request: FitRequest, category: Category) -> str | None:
    if request.weights is None and category.synthetic and request.config.backbone == PACKAGED_NAME and packaged_path():
        return "packaged"  # the demo needs no network
    return request.weights
