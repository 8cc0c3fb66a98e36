"""Thresholds from normal images that the model was not fitted to (paper sections 3.3 and 4.1.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import CalibrationError
from saae_runtime.thresholds import ThresholdAccumulator, ThresholdTable

from .config import TEXTURES
from .data.category import Sample, content_digest

__all__ = ["OBJECT_FPR", "TEXTURE_FPR", "Calibration", "calibrate", "default_fpr"]

TEXTURE_FPR = 0.0
OBJECT_FPR = 0.001
"""Acceptable pixel FPR of objects (paper section 4.1.2); textures have 0."""

Score = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], float]]


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


def default_fpr(facts: Mapping[str, Any], name: str) -> float:
    """The paper's acceptable pixel FPR (section 4.1.2) of what a model was fitted as.

    Args:
        facts: of the fit, see `saae_train.model.checkpoint.Checkpoint`; `texture` in it counts.
        name: of the category, which counts where the facts do not say.
    """
    return TEXTURE_FPR if facts.get("texture", name in TEXTURES) else OBJECT_FPR


def calibrate(
    score: Score,
    samples: Sequence[Sample],
    pixel_fpr: float = OBJECT_FPR,
    image_fpr: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Computes both threshold tables from the scores of the graph that will be deployed.

    Args:
        score: frame, uint8 H x W x 3 -> (anomaly map, float32 H x W; image score).
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
        if progress is not None:
            progress(done, len(samples))
        anomaly_map, value = score(sample.read())
        pixels.add(anomaly_map)
        scores.append(float(value))
    if progress is not None:
        progress(len(samples), len(samples))
    image = ThresholdTable.from_samples(scores, image_fpr)
    return Calibration(pixels.table(pixel_fpr), image, tuple(scores), content_digest(samples))
