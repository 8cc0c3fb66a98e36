"""Thresholds from normal images: held out, or each left out of the memory (paper sections 3.3 and 4.1.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import CalibrationError, ConfigError
from saae_runtime.estimate import DEFAULT_FALSE_ALARMS
from saae_runtime.geometry import gaussian_matrix, upsample_map
from saae_runtime.progress import Progress, silent
from saae_runtime.result import Scorer
from saae_runtime.thresholds import ThresholdAccumulator, ThresholdTable

from .config import TEXTURES
from .data.category import Sample
from .data.split import content_digest

if TYPE_CHECKING:
    from .model.left_out import LeftOut

__all__ = [
    "OBJECT_FPR",
    "TEXTURE_FPR",
    "Calibration",
    "calibrate",
    "calibrate_left_out",
    "check_default_rate",
    "default_fpr",
    "left_out_scores",
    "smooth_left_out",
]

TEXTURE_FPR = 0.0
OBJECT_FPR = 0.001
"""Acceptable pixel FPR of objects (paper section 4.1.2); textures have 0."""


@dataclass(frozen=True)
class Calibration:
    """Threshold tables and scores from normal images.

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


def check_default_rate(rate: float | None, option: str) -> None:
    """Check a false-positive rate that is to be a bundle's default.

    Args:
        rate: of pixels or images; None: not given.
        option: its name, for the message.

    Raises:
        ConfigError: not a share below 1. With 1, which is easily meant as one percent, every part would be defective.
    """
    if rate is not None and not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"{option} {rate:g} is not possible.",
            "It is the share of good parts, or of their pixels, that may lie above the threshold; 1 is all of them.",
            f"{option} 0.01 for one percent",
        )


def default_fpr(texture: bool | None, name: str) -> float:
    """The paper's acceptable pixel FPR (section 4.1.2), by whether the model was fitted as a texture.

    Args:
        texture: whether it was fitted as a texture; None: not known.
        name: of the category; decides if `texture` is None.
    """
    return TEXTURE_FPR if (name in TEXTURES if texture is None else texture) else OBJECT_FPR


def calibrate(
    scorer: Scorer,
    samples: Sequence[Sample],
    pixel_fpr: float = OBJECT_FPR,
    image_fpr: float = 0.0,
    progress: Progress = silent,
    estimate: bool = False,
) -> Calibration:
    """Compute both threshold tables from the scores of the graph that will be deployed.

    Args:
        scorer: scores one frame.
        samples: held-out normal images.
        pixel_fpr: default acceptable share of normal pixels above T.
        image_fpr: default acceptable share of normal images called anomalous.
        progress: called with (done, total).
        estimate: image thresholds by the rule `log-normal` instead of the scores' own quantiles.

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
    if estimate:
        image = ThresholdTable.estimated(scores, image_fpr)
    else:
        image = ThresholdTable.from_samples(scores, image_fpr)
    return Calibration(pixels.table(pixel_fpr), image, tuple(scores), content_digest(samples))


def left_out_scores(left_out: LeftOut, smoothing: float, frame_size: tuple[int, int]) -> list[float]:
    """The image score of each fitted image as if it were new, as the graph computes it.

    Args:
        left_out: scores from the fit.
        smoothing: of the map, in patches, see `saae_train.model.detector.Detector`.
        frame_size: (H, W) of the graph's frames.
    """
    return [float(upsample_map(scores, frame_size).max()) for scores in _smoothed(left_out, smoothing)]


def calibrate_left_out(
    left_out: LeftOut,
    smoothing: float,
    frame_size: tuple[int, int],
    map_size: tuple[int, int],
    digest: str,
    pixel_fpr: float = OBJECT_FPR,
    image_fpr: float = DEFAULT_FALSE_ALARMS,
) -> Calibration:
    """Both threshold tables from the scores of the fitted images, each left out of the memory.

    Args:
        left_out: of the fit.
        smoothing: of the map, in patches.
        frame_size: (H, W) of the graph's frames.
        map_size: (H, W) at which the maps' pixels are counted; the model's input size is enough.
        digest: content digest of the images.
        pixel_fpr: default acceptable share of normal pixels above T.
        image_fpr: default acceptable share of normal images called anomalous.

    Raises:
        CalibrationError: a score that is not finite.
        ConfigError: a rate outside 0..1.
    """
    pixels = ThresholdAccumulator()
    for scores in _smoothed(left_out, smoothing):
        pixels.add(upsample_map(scores, map_size))
    images = left_out_scores(left_out, smoothing, frame_size)
    return Calibration(pixels.table(pixel_fpr), ThresholdTable.estimated(images, image_fpr), tuple(images), digest)


def smooth_left_out(left_out: LeftOut, smoothing: float, index: int) -> NDArray[np.float32]:
    """The smoothed scores of one fitted image, float32 h x w."""
    height, width = left_out.scores.shape[1:]
    rows, columns = gaussian_matrix(height, smoothing), gaussian_matrix(width, smoothing)
    smoothed: NDArray[np.float32] = (rows @ left_out.scores[index].numpy() @ columns.T).astype(np.float32)
    return smoothed


def _smoothed(left_out: LeftOut, smoothing: float) -> Iterator[NDArray[np.float32]]:
    for index in range(len(left_out.names)):
        yield smooth_left_out(left_out, smoothing, index)
