"""Thresholds of a deployed graph from the fitted images, each left out of the memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saae_runtime.engine import Engine
from saae_runtime.errors import CalibrationError
from saae_runtime.estimate import ScoreModel
from saae_runtime.geometry import upsample_map
from saae_runtime.progress import Progress, silent
from saae_runtime.thresholds import ThresholdTable
from saae_train.calibrate import Calibration, calibrate_left_out, smooth_left_out
from saae_train.data.category import Sample, distinct_names
from saae_train.data.split import content_digest, content_hashes, spread
from saae_train.model.checkpoint import Checkpoint

from ..parity.pytorch import TorchReference

__all__ = ["LeftOutCalibrator", "Outlier"]

_COMPARED = 16
"""Number of images that the scale of a precision is measured on."""

_LEVER = 0.02
"""An image is reported if the threshold would fall by this share without it, and by more than usual among so few."""

_USUAL = 8.0
"""Among n images of one log-normal distribution, the threshold falls by less than this many n-ths of its spread without
any of them, in 95 of 100 sets of 10 to 200."""


@dataclass(frozen=True)
class Outlier:
    """A fitted image that looks unlike the others: an unnoticed defect, glare, another product.

    Attributes:
        index: its index among the fitted images.
        name: its file's name, as it is now.
        score: as if it were new, in units of the image threshold.
        leverage: relative fall of the threshold without it.
    """

    index: int
    name: str
    score: float
    leverage: float


class LeftOutCalibrator:
    """Computes the threshold tables of each precision.

    The leave-one-out scores of the fitted images are PyTorch's. A deployed graph cannot leave an image out, so its
    scale is measured: the median ratio of its image scores to PyTorch's on the same frames, by which the tables are
    multiplied. The frames are mirrored, because the memory holds patches of the fitted images as they are: there the
    distances are next to nothing, and rounding is most of them.

    Args:
        checkpoint: with the left-out scores.
        samples: the images at hand: the fitted ones, or others with a given model. Only those that the model was fitted
            on, by their content, are shown with their scores; the tables come from all scores of the fit.
        reference: the model in PyTorch at the graph's frame size.
        pixel_fpr: default acceptable share of normal pixels above T.
        image_fpr: default acceptable share of normal images called defective.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        reference: TorchReference,
        pixel_fpr: float,
        image_fpr: float,
    ) -> None:
        if checkpoint.left_out is None:
            raise CalibrationError("The model holds no scores of its own images.", "It has no memory.", "fit again")
        self.left_out = checkpoint.left_out
        self.there = _fitted(checkpoint, samples)
        """The fitted images that are at hand, by their index in the fit."""
        self._names = dict(zip(samples, distinct_names([sample.path for sample in samples]), strict=True))
        detector = checkpoint.detector
        self._reference = calibrate_left_out(
            self.left_out,
            detector.smoothing,
            reference.frame_size,
            detector.backbone.input_size,
            checkpoint.record.digest or content_digest(samples),
            pixel_fpr,
            image_fpr,
        )
        self._smoothing = detector.smoothing
        self.factor = 1.0  # scale of the engine measured last
        self._frames = [np.ascontiguousarray(sample.read()[:, ::-1]) for sample in spread(samples, _COMPARED)]
        self._expected = [float(reference(frame).score) for frame in self._frames]

    def __call__(self, engine: Engine, progress: Progress = silent) -> Calibration:
        """The tables of an engine.

        Raises:
            BackendError: the engine fails, or its values are not finite.
        """
        ratios = []
        for number, (frame, expected) in enumerate(zip(self._frames, self._expected, strict=True)):
            progress(number, len(self._frames))
            ratios.append(float(engine(frame).score) / max(expected, 1e-12))
        self.factor = factor = statistics.median(ratios)
        found = self._reference
        return Calibration(
            found.pixel.scaled(factor),
            found.image.scaled(factor),
            tuple(score * factor for score in found.scores),
            found.digest,
        )

    def anomaly_map(self, index: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """The map of a fitted image as if it were new, float32 H x W at `size`, on the scale of the deployed graph."""
        return upsample_map(smooth_left_out(self.left_out, self._smoothing, index), size) * np.float32(self.factor)

    def outliers(self) -> list[Outlier]:
        """Images at hand to look at, highest score first: unlike the others, or with a large effect on the threshold.

        An image is unlike the others if, among this many, only half an image is expected to reach its score.
        """
        threshold, scores = self._reference.image.at(), self._reference.scores
        lever = _leverage(scores, self._reference.image)
        model = ScoreModel.fit(scores)
        strange, usual = model.bound(0.5 / len(scores)), 1.0 - math.exp(-_USUAL * model.spread / len(scores))
        found = [
            Outlier(index, self._names[sample], scores[index] / threshold, lever[index])
            for index, sample in self.there.items()
            if scores[index] > strange or lever[index] > max(_LEVER, usual)
        ]
        return sorted(found, key=lambda item: -item.score)


def _fitted(checkpoint: Checkpoint, samples: Sequence[Sample]) -> dict[int, Sample]:
    """Index in the fit -> image, for those of `samples` that the model was fitted on."""
    left_out = checkpoint.left_out
    if left_out is not None and left_out.hashes:
        index = {key: number for number, key in enumerate(left_out.hashes)}
        pairs = zip(content_hashes(samples), samples, strict=True)
        return dict(sorted((index[key], sample) for key, sample in pairs if key in index))
    # Earlier versions wrote only the digest of all images in their order.
    return dict(enumerate(samples)) if checkpoint.record.digest == content_digest(samples) else {}


def _leverage(scores: Sequence[float], table: ThresholdTable) -> list[float]:
    model = ScoreModel.fit(scores)
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    by_place = model.leverage(table.default_fpr)
    found = [0.0] * len(scores)
    for place, index in enumerate(order):
        found[index] = float(by_place[place])
    return found
