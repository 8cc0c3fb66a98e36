"""The fit of a build: a given model, one that an earlier run left, or a new one; and the images to calibrate it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from saae_runtime.errors import SaaeError
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file
from saae_runtime.terminal import Stages
from saae_runtime.version import saae_version
from saae_train.config import TEXTURES
from saae_train.data.category import Category, Sample, content_digest, distinct_names, split_held_out
from saae_train.data.unseen import unseen_images
from saae_train.fitting.fit import Reporter, fit
from saae_train.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saae_train.model.vit import build_backbone, choose_layers
from saae_train.model.weights import PACKAGED_NAME, packaged_path, refuse_random

from ..graph.half_weights import require_blocks
from .options import BuildOptions

__all__ = ["fitted", "model_folder", "model_key"]


def fitted(
    options: BuildOptions, category: Category, work: Path, stages: Stages
) -> tuple[Checkpoint, tuple[Sample, ...], bool]:
    """The fitted model, reused where the same one is there; the images to calibrate on; whether it saw none of them.

    Raises:
        SaaeError: of the kind that loading, fitting or saving raises.
    """
    with stages.stage("fit") as stage:
        if options.checkpoint is not None:
            checkpoint = load_checkpoint(options.checkpoint)
            refuse_random(checkpoint.detector.backbone.weights.source, checkpoint.detector.backbone.name)
            if options.half_weights:
                require_blocks(checkpoint.detector.backbone.name, checkpoint.detector.backbone.layers)
            stage.note(f"taken from {options.checkpoint}")
            return dataclasses.replace(checkpoint, category=category.name), *_unseen(checkpoint, category, stages)
        fitting, held_out = split_held_out(category.train, options.config.held_out, seed=options.config.seed)
        weights = _weights(options, category)
        folder = work / "models" / model_key(options, category, fitting, weights)
        if not options.refit and (folder / "config.json").is_file():
            try:
                checkpoint = load_checkpoint(folder)
            except SaaeError as error:
                stages.say(f"  {error.what} Fitting again.", "yellow")
            else:
                refuse_random(checkpoint.detector.backbone.weights.source, checkpoint.detector.backbone.name)
                stage.note(f"reused {folder}")
                return checkpoint, held_out, True
        layers = options.config.layers or _default_layers(options.config.backbone, stages)
        backbone = build_backbone(options.config.backbone, layers, options.config.input_size, weights)
        refuse_random(backbone.weights.source, backbone.name)
        stage.note(f"weights: {backbone.weights.source}")
        reporter = Reporter(
            features=lambda done, total: stage(done, total, "images, features"),
            steps=lambda done, total, loss: stage(done, total, f"steps, loss {loss:.4f}"),
            say=lambda text: stages.say(f"  {text}"),
        )
        facts = {
            "held_out": sorted(distinct_names([sample.path for sample in held_out])),
            "synthetic": category.synthetic,
        }
        checkpoint = fit(
            backbone,
            fitting,
            options.config,
            category.name,
            device=options.device,
            cache=options.cache,
            texture=options.texture,
            reporter=reporter,
            facts=facts,
        )
        save_checkpoint(folder, checkpoint)
        stage.note(f"{len(fitting)} images, {len(held_out)} held out")
    return checkpoint, held_out, True


def model_folder(options: BuildOptions, category: Category, work: Path) -> Path:
    """Where `fitted` keeps the model that it fits."""
    fitting, _ = split_held_out(category.train, options.config.held_out, seed=options.config.seed)
    return work / "models" / model_key(options, category, fitting, _weights(options, category))


def _weights(options: BuildOptions, category: Category) -> str | None:
    if options.weights is None and category.synthetic and options.config.backbone == PACKAGED_NAME and packaged_path():
        return "packaged"  # the demo needs no network
    return options.weights


def _default_layers(backbone: str, stages: Stages) -> tuple[int, ...]:
    layers, measured = choose_layers(backbone)
    if not measured:
        listed = ", ".join(map(str, layers))
        stages.say(
            f"  layers {listed}: the middle third, a guess; this backbone was not measured. Choose: --layers", "yellow"
        )
    return layers


def model_key(options: BuildOptions, category: Category, fitting: Sequence[Sample], weights: str | None) -> str:
    """Names a fitted model after everything that shaped it."""
    shaped = {
        "saae": saae_version(),
        "config": options.config.to_json(),
        "images": content_digest(fitting),
        "weights": sha256_file(weights) if weights is not None and Path(weights).is_file() else weights,
        "category": category.name,
        "texture": category.name in TEXTURES if options.texture is None else options.texture,
    }
    return sha256_bytes(canonical_json(shaped).encode())[:16]


def _unseen(checkpoint: Checkpoint, category: Category, stages: Stages) -> tuple[tuple[Sample, ...], bool]:
    chosen = unseen_images(checkpoint.facts, checkpoint.config, category)
    if chosen.note:
        stages.say(f"  {chosen.note}", "yellow" if chosen.honest else "bold yellow")
    return chosen.samples, chosen.honest
