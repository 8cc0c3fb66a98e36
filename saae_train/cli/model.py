"""A model named on a command line, bundle or checkpoint: its scorer, its thresholds, and the images to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saae_runtime.errors import ConfigError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.folders import put_back
from saae_runtime.progress import Progress, silent
from saae_runtime.result import Scorer

from ..data.category import Category, find_category, from_folders

if TYPE_CHECKING:
    from saae_runtime.engine import Engine

    from ..data.split import Split
    from ..model.checkpoint import Checkpoint

__all__ = ["OpenModel", "named_images", "open_model", "thresholds"]


@dataclass(frozen=True)
class OpenModel:
    """A bundle's engine or a fitted checkpoint, ready to score.

    Attributes:
        scorer: scores one frame.
        category: the product that it was made for.
    """

    scorer: Scorer
    category: str
    engine: Engine | None = None
    checkpoint: Checkpoint | None = None

    @property
    def white_level(self) -> int | None:
        """The white level of 16-bit images that the model was fitted with."""
        if self.engine is not None:
            return self.engine.white_level
        return self.checkpoint.config.white_level if self.checkpoint is not None else None


def named_images(category: str | None, data: Path | None, normal: Sequence[Path]) -> Category:
    """The images that `--category` with `--data`, or `--normal`, name.

    Raises:
        ConfigError: neither was given, or both.
        DataError: there are no such images.
    """
    if normal and data is not None:
        raise ConfigError(
            "--normal and --data are both given.",
            "Each of them says where all the images are.",
            "leave one of them out",
        )
    if normal:
        return from_folders(normal, name=category)
    if category is None or data is None:
        raise ConfigError(
            "Which images?", "Neither --category with --data nor --normal was given.", "--category zipper --data data"
        )
    return find_category(data, category)


def open_model(path: Path, backend: str, stack: ExitStack) -> OpenModel:
    """Open a bundle, or load a checkpoint; the stack closes it.

    Raises:
        BundleError, BackendError: of a bundle.
        CheckpointError: no checkpoint there, or a damaged one.
        WeightsError: its backbone's weights are random.
    """
    from ..model.weights import refuse_random

    put_back(path)  # also if a killed writer has moved it aside
    if (path / "manifest.json").is_file():
        from saae_runtime.engine import Engine

        engine = stack.enter_context(Engine(path, backend=backend))
        refuse_random(engine.manifest.backbone.weights_source, engine.manifest.backbone.name)
        return OpenModel(engine, engine.manifest.category, engine=engine)
    from ..model.checkpoint import load_checkpoint
    from ..model.scorer import TorchScorer

    checkpoint = load_checkpoint(path)
    refuse_random(checkpoint.detector.backbone.weights.source, checkpoint.detector.backbone.name)
    return OpenModel(TorchScorer(checkpoint.detector), checkpoint.category, checkpoint=checkpoint)


def thresholds(
    model: OpenModel,
    split: Split | None,
    name: str,
    fpr: float | None = None,
    image_fpr: float | None = None,
    progress: Progress = silent,
) -> tuple[float, float, str]:
    """Pixel and image T, and a text that says where they come from.

    A bundle has its own. A checkpoint has none, so they are calibrated on normal images that it was not fitted on, by
    default at the paper's rates (section 4.1.2); one with a memory has leave-one-out scores of its own images.

    Args:
        model: from `open_model`.
        split: its held-out images calibrate a checkpoint without a memory.
        name: of the category.
        fpr, image_fpr: acceptable rates of pixels and images; None: the bundle's, or the paper's.
        progress: called with (done, total).

    Raises:
        ConfigError: a rate outside 0..1.
        CalibrationError: scores that are not finite.
    """
    if model.engine is not None:
        tables = model.engine.manifest.thresholds[model.engine.backend.precision]
        return tables.pixel.at(fpr), tables.image.at(image_fpr), "the bundle's own"
    from ..calibrate import OBJECT_FPR, calibrate, calibrate_left_out, default_fpr
    from ..data.shape import typical_shape

    assert model.checkpoint is not None
    assert split is not None
    checkpoint = model.checkpoint
    if checkpoint.left_out is not None:
        size = checkpoint.detector.backbone.input_size
        shape = typical_shape(split.fitting)
        found = calibrate_left_out(
            checkpoint.left_out,
            checkpoint.detector.smoothing,
            size if shape is None else shape.size,
            size,
            checkpoint.record.digest or "",
            OBJECT_FPR if fpr is None else fpr,
            DEFAULT_FALSE_ALARMS if image_fpr is None else image_fpr,
        )
        return found.pixel.at(), found.image.at(), f"from {len(found.scores)} normal images, each left out"
    rate = default_fpr(model.checkpoint.record.texture, name) if fpr is None else fpr
    found = calibrate(model.scorer, split.held_out, rate, image_fpr or 0.0, progress)
    source = f"calibrated on {len(split.held_out)} normal images at a pixel FPR of {rate:g}"
    return found.pixel.at(), found.image.at(), source
