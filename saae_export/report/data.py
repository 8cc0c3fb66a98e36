"""What a build report can show: frozen dataclasses of plain values, every part optional.

Fill what is known and leave the rest out; a part that is left out becomes one sentence in the report
saying so, never an empty chart. Scores and thresholds are the deployed artefact's own numbers.

Example:
    >>> import numpy as np
    >>> from saae_export.report.data import Facts, LatencyRow, MetricRow, ReportData, Scores
    >>> data = ReportData(
    ...     category="zipper",
    ...     synthetic=True,
    ...     facts=[Facts("Model", {"backbone": "vit_small_patch14_dinov2", "V": 60, "layers": [3, 4, 5]})],
    ...     scores=Scores(held_out=np.array([0.1, 0.2, 0.15]), threshold=0.3),
    ...     metrics=[MetricRow("overall", {"pixel ROC-AUC": 0.985, "PRO-AUC": None}, images=12,
    ...                        reasons={"PRO-AUC": "no ground-truth masks"})],
    ...     latency=[LatencyRow("onnxruntime:cpu", "fp32", median_ms=42.0, p95_ms=44.1, inside="frame to result")],
    ... )
    >>> data.scores.held_out.size
    3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from saae_train.charts.svg import Floats

if TYPE_CHECKING:
    from saae_runtime.manifest import Parity
    from saae_runtime.thresholds import ThresholdTable


@dataclass(frozen=True)
class Facts:
    """One titled list of name-value pairs ("Data", "Backbone", "Model", "Versions", ...).

    Values may be str, int, float, bool, None or lists of them; a long hex digest is shown in full,
    in a fixed-width face.
    """

    title: str
    rows: Mapping[str, object]


@dataclass(frozen=True)
class ThresholdSet:
    """The calibrated thresholds of one precision ("fp32", "fp16", "int8")."""

    precision: str
    pixel: ThresholdTable | None = None
    image: ThresholdTable | None = None


@dataclass(frozen=True)
class Scores:
    """Image scores, one per image, for the histogram; `threshold` is the image threshold in force.

    held_out: normal images kept out of the fit (those behind the thresholds).
    test_good, test_defective: the labelled test images, where there are any.
    """

    held_out: Floats = ()
    test_good: Floats = ()
    test_defective: Floats = ()
    threshold: float | None = None
    held_out_label: str = "normal, held out"


@dataclass(frozen=True)
class MetricRow:
    """One row of the metrics table: "overall" or a defect type.

    values: metric name to its value in 0..1; None where it is left out, with the reason under the same
    name in `reasons`. The first row's metrics are the report's headline numbers.
    """

    label: str
    values: Mapping[str, float | None]
    images: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """One curve over a rate (ROC, PRO, precision-recall), both axes in 0..1.

    x: false-positive rate (or recall), ascending. y: true-positive rate, mean region overlap (or precision).
    area: the number quoted for it. limit: the x up to which the area counts (0.3 for PRO). chance: whether the diagonal
    is what guessing gives. dot: a marked point (x, y) and its label.
    """

    title: str
    x: Floats
    y: Floats
    x_label: str = "false-positive rate"
    y_label: str = "true-positive rate"
    area: float | None = None
    limit: float | None = None
    chance: bool = True
    dot: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class FitHistory:
    """The course of the fit. loss: one value per step (or per epoch, as `unit` says), in order."""

    loss: Floats
    unit: str = "step"
    steps: Floats = ()
    """The step number of each loss; empty means 1, 2, 3, ..."""
    seconds: float | None = None
    stopped: str = ""
    """Why it ended when that was not the end of the schedule."""


@dataclass(frozen=True)
class ParityRow:
    """The agreement of one artefact with the PyTorch reference; parity None needs a `why_not`."""

    artefact: str
    precision: str
    parity: Parity | None = None
    why_not: str = ""


@dataclass(frozen=True)
class LatencyRow:
    """Time per frame of one backend, milliseconds. `inside` says what the clock includes."""

    backend: str
    precision: str
    median_ms: float
    p95_ms: float
    inside: str
    batch: int = 1
    runs: int | None = None
    where: str = ""
    """The machine: processor or GPU, threads."""


@dataclass(frozen=True)
class Example:
    """One frame worth looking at.

    frame: uint8 [H, W, 3] RGB. anomaly_map: float32 [H, W]. threshold: pixel T.
    truth: bool [H, W] ground-truth mask, None where there is none.
    verdict: in words, such as "missed defect", "false alarm", "largest normal".
    """

    name: str
    frame: npt.NDArray[np.uint8]
    anomaly_map: npt.NDArray[np.float32]
    threshold: float
    score: float
    image_threshold: float | None = None
    truth: npt.NDArray[np.bool_] | None = None
    label: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class SelfTestView:
    """What was found of simulated defects.

    chart: uint8 [h, w, 3] RGB. columns: headings. rows: (kind, one cell a column). easy: share of the large, strong
    ones found, None if too few were drawn. misses_easy: too many of them were missed. examples: frames with a simulated
    defect, its mask as `truth`.
    """

    chart: npt.NDArray[np.uint8]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    easy: float | None
    misses_easy: bool
    summary: str
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class ReportData:
    """Everything `saae_export.report.html.write_report` shows, in the order in which it shows it.

    Only `category` is required. synthetic: the data is the drawn demo set, said loudly at the top.
    simulated: one sentence for each thing in the report that was simulated rather than measured.
    missing: section name to the reason why it is empty ("metrics": "no defect images were given").
    next_commands: (what it does, command line) pairs for the reader's next step.
    """

    category: str
    created: str = ""
    bundle: str = ""
    synthetic: bool = False
    simulated: Sequence[str] = ()
    notes: Sequence[str] = ()
    facts: Sequence[Facts] = ()
    thresholds: Sequence[ThresholdSet] = ()
    scores: Scores | None = None
    metrics: Sequence[MetricRow] = ()
    curves: Sequence[Curve] = ()
    self_test: SelfTestView | None = None
    fit: FitHistory | None = None
    parity: Sequence[ParityRow] = ()
    latency: Sequence[LatencyRow] = ()
    worst: Sequence[Example] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    next_commands: Sequence[tuple[str, str]] = ()
