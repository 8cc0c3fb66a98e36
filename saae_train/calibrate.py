"""Thresholds from normal images that the model was not fitted to (paper sections 3.3 and 4.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saae_runtime.errors import CalibrationError
from saae_runtime.progress import Progress, silent
from saae_runtime.result import Scorer
from saae_runtime.thresholds import ThresholdAccumulator, ThresholdTable

from .config import TEXTURES
from .data.category import Sample
from .data.split import content_digest

__all__ = ["OBJECT_FPR", "TEXTURE_FPR", "Calibration", "calibrate", "default_fpr"]

TEXTURE_FPR = 0.0
OBJECT_FPR = 0.001
"""Acceptable pixel FPR of objects (paper section 4.1.2); textures have 0."""


@dataclass(frozen=True)
class Calibration:
    """What the held-out normal images gave.

    Attributes:
        pixel: threshold table of anomaly map values.
        image: threshold table of image scores; default FPR 0, just above the largest score seen.
        scores: image scores, in the order of the samples.
        digest: content digest of the samples.
    """

    pixel: ThresholdTable
    image: ThresholdTable
    scores: tuple[float, ...]
    digest: str


def default_fpr(texture: bool | None, name: str) -> float:
    """The paper's acceptable pixel FPR (section 4.1.2) of what a model was fitted as.

    Args:
        texture: whether it was fitted as a texture; None: not known.
        name: of the category, which counts where it is not known.
    """
    return TEXTURE_FPR if (name in TEXTURES if texture is None else texture) else OBJECT_FPR


def calibrate(
    scorer: Scorer,
    samples: Sequence[Sample],
    pixel_fpr: float = OBJECT_FPR,
    image_fpr: float = 0.0,
    progress: Progress = silent,
) -> Calibration:
    """Computes both threshold tables from the scores of the graph that will be deployed.

    Args:
        scorer: scores one frame.
        samples: held-out normal images.
        pixel_fpr: default acceptable share of normal pixels above T.
        image_fpr: default acceptable share of normal images called anomalous.
        progress: called with (done, total).

    Raises:
        CalibrationError: no samples, or a score that is not finite.
        ConfigError: a rate outside 0..1.
        ImageError: an image cannot be read.
    """
    if not samples:
        raise CalibrationError(
            "There are no normal images to calibrate on.", "All of them were used for fitting.", "add normal images"
        )
    pixels = ThresholdAccumulator()
    scores = []
    for done, sample in enumerate(samples):
        progress(done, len(samples))
        found = scorer(sample.read())
        pixels.add(found.anomaly_map)
        scores.append(float(found.score))
    progress(len(samples), len(samples))
    image = ThresholdTable.from_samples(scores, image_fpr)
    return Calibration(pixels.table(pixel_fpr), image, tuple(scores), content_digest(samples))
