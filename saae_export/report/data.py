"""The data of a build report: manifest, evaluation, self-test, and what only the build knows.

Every part except the manifest may be missing; the report then says so in one sentence.
Scores and thresholds are those of the deployed artefact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saae_runtime.manifest import Manifest
from saae_runtime.regions import defect_mask
from saae_train.charts.svg import Floats
from saae_train.evaluation.result import Evaluation
from saae_train.record import FitRecord
from saae_train.selftest.result import SelfTest

__all__ = ["Example", "LatencyRow", "Report", "outline"]


@dataclass(frozen=True)
class LatencyRow:
    """Time per frame of one backend, milliseconds. `inside` says what the clock includes, `where` the machine."""

    backend: str
    precision: str
    median_ms: float
    p95_ms: float
    inside: str
    batch: int = 1
    runs: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Example:
    """One frame worth looking at.

    Attributes:
        name: the image's file name.
        frame: uint8 H x W x 3 RGB.
        anomaly_map: float32 H x W.
        threshold: pixel T.
        score: image score.
        image_threshold: image T.
        truth: bool H x W, the ground-truth mask; None where there is none.
        label: "good", or the defect type.
        verdict: for example "missed defect", "false alarm", "largest normal".
    """

    name: str
    frame: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    threshold: float
    score: float
    image_threshold: float | None = None
    truth: NDArray[np.bool_] | None = None
    label: str = ""
    verdict: str = ""


def outline(example: Example) -> NDArray[np.bool_]:
    """The outlined pixels, bool H x W: the defects of its verdict, or all above T if there are none."""
    anomaly_map = np.asarray(example.anomaly_map, np.float32)
    if example.image_threshold is None:
        return anomaly_map > np.float32(example.threshold)
    return defect_mask(anomaly_map, example.threshold, example.image_threshold, example.score)


@dataclass(frozen=True)
class Report:
    """Everything that `saae_export.report.html.write_report` shows.

    Attributes:
        manifest: of the finished bundle, with parity.
        bundle: the bundle's folder as it was given.
        source: text that says where the images were found.
        record: of the fit.
        evaluation: on the test set; None where there are no test images.
        self_test: on simulated defects; None where there is none.
        held_out_scores: image scores of the calibration images, from the engine that gave the metrics.
        image_threshold: that engine's.
        not_compared: artefact file -> why it could not be compared here.
        latency: one row per backend and precision.
        examples: frames worth looking at, the most important first.
        simulated: frames with simulated defects.
        calibrated_with: backends that thresholds were computed on.
        shown_with: backend, arithmetic and file that metrics and examples were computed with.
    """

    manifest: Manifest
    bundle: str = ""
    source: str = ""
    record: FitRecord = field(default_factory=FitRecord)
    evaluation: Evaluation | None = None
    self_test: SelfTest | None = None
    held_out_scores: Floats = ()
    image_threshold: float | None = None
    not_compared: Mapping[str, str] = field(default_factory=dict)
    latency: Sequence[LatencyRow] = ()
    examples: Sequence[Example] = ()
    simulated: Sequence[Example] = ()
    calibrated_with: str = ""
    shown_with: str = ""
