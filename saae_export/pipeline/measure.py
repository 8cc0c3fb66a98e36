"""Measurements of a build: quality on test images, simulated defects, time of the backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from saae_runtime import backends
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import SimulationError
from saae_runtime.estimate import chance_of_alarms
from saae_runtime.terminal import Stages
from saae_runtime.thresholds import ThresholdTable
from saae_train.data.category import Sample
from saae_train.evaluation.decisions import Decision, decide
from saae_train.evaluation.result import Evaluation
from saae_train.selftest.result import SelfTest
from saae_train.selftest.run import draw_examples, require_detection, selftest

from ..report.data import Example, LatencyRow
from .images import named_frames
from .latency import measure
from .verdicts import Judge

__all__ = [
    "choose_backend",
    "deployed",
    "keep_speeds",
    "measure_detection",
    "measure_latency",
    "measure_quality",
    "decision_of",
    "say_verdicts",
    "verdict_line",
]


def deployed(bundle: Bundle) -> Engine:
    """The engine as `saae-run` would open it here."""
    return Engine(bundle, verify=False, cache=False)


_CHANCE = 0.01
"""Probability below which an excess of false alarms is not chance."""


def measure_quality(bundle: Bundle, judge: Judge, stages: Stages) -> Evaluation | None:
    """Evaluate the bundle on the test set; None without test images."""
    with stages.stage("evaluate") as stage, deployed(bundle) as engine:
        evaluation = judge.evaluation(engine, stage)
        if evaluation is None:
            stage.note("no test images, so no metrics")
            return None
        stage.note(f"{len(evaluation.images)} test images with {engine.backend.name} {engine.backend.precision}")
    stages.console.print(evaluation.table())
    return evaluation


def measure_detection(
    bundle: Bundle,
    held_out: Sequence[Sample],
    frames: int,
    cure: str | None,
    evaluation: Evaluation | None,
    stages: Stages,
    *,
    synthetic: bool,
) -> tuple[SelfTest | None, list[Example]]:
    """Count simulated defects found on the held-out images, with one example of each kind; the second gate of a build.

    Args:
        bundle: calibrated.
        held_out: normal images to draw on.
        frames: number of images with a defect; 0: no self-test.
        cure: what to type if the gate fails; None: no gate.
        evaluation: on real defects, if there are any: a model that finds half of them is not blind.
        stages: progress.
        synthetic: whether the images were drawn.

    Raises:
        SelfTestError: the model misses large, strong simulated defects.
    """
    with stages.stage("self-test (simulated defects)") as stage:
        if not frames:
            stage.note("not asked for")
            return None, []
        with deployed(bundle) as engine:
            try:
                result = selftest(
                    engine,
                    held_out,
                    threshold=engine.threshold,
                    image_threshold=engine.image_threshold,
                    frames=frames,
                    synthetic=synthetic,
                    progress=stage,
                )
            except SimulationError as error:  # not the model's fault
                stages.say(f"  no self-test: {error.what} {error.why}".rstrip(), "yellow")
                stage.note("not possible")
                return None, []
            found = [
                Example(
                    name=Path(defect.file).name,
                    frame=drawn.frame,
                    anomaly_map=drawn.anomaly_map,
                    threshold=result.threshold,
                    score=defect.score,
                    image_threshold=result.image_threshold,
                    truth=drawn.truth,
                    label=f"simulated {defect.kind}, {defect.size}, {defect.contrast}",
                    verdict="found" if defect.found else "missed",
                )
                for defect, drawn in draw_examples(engine, held_out, result, per_kind=1)
            ]
            words = f"{len(result.defects)} drawn, {result.balanced_text()} found"
            stage.note(f"{words} with {engine.backend.name} {engine.backend.precision}")
    stages.console.print(result.table())
    if evaluation is not None and _finds_real(evaluation):
        if result.misses_easy:
            stages.say(
                f"  It finds {result.easy} large, strong SIMULATED defects, but at least half of the real ones: the "
                "simulation is not like the defects of this product.",
                "yellow",
            )
    elif cure is not None:
        require_detection(result, cure)
    elif result.misses_easy:
        stages.say(f"  The model is BLIND: it finds {result.easy} large, strong simulated defects.", "bold yellow")
    return result, found


def _finds_real(evaluation: Evaluation) -> bool:
    found = decision_of(evaluation)
    return not evaluation.synthetic and found is not None and found.defective > 0 and found.tpr >= 0.5


def decision_of(evaluation: Evaluation) -> Decision | None:
    """The verdicts on the test set at the bundle's image threshold."""
    if evaluation.image_threshold is None:
        return None
    images = evaluation.images
    return decide(
        [image.score for image in images], [image.is_anomalous for image in images], evaluation.image_threshold
    )


def say_verdicts(evaluation: Evaluation, table: ThresholdTable, stages: Stages) -> None:
    """Print the verdicts on the test images in one line, with a warning if good images contradict the expected rate.

    Args:
        evaluation: on the test set.
        table: of the image threshold.
        stages: for the output.
    """
    found = decision_of(evaluation)
    if found is None:
        return
    stages.say(f"  verdicts at the default threshold: {verdict_line(found)}", "bold")
    rate, count = table.default_fpr, table.count
    above = math.floor(rate * count + 1e-9)
    if found.good and chance_of_alarms(found.false_alarms, found.good, above, count) < _CHANCE:
        expected = f"{rate:.1%}" if above else f"1 in {count + 1}"
        stages.say(
            f"  WARNING: {found.false_alarms} of {found.good} good test images are called defective, where {expected} "
            "were expected. They differ from the images that the model was fitted on (light, camera, time, another "
            "batch). Add such images to the good ones, or calibrate with good images from the line: "
            "saae-export calibrate BUNDLE --normal FOLDER",
            "bold red",
        )


def verdict_line(found: Decision) -> str:
    """`23 of 28 defective images found (5 missed), 0 of 12 good ones called defective (at most 22 %, at 95 %)`."""
    missed = found.defective - found.found
    parts = []
    if found.defective:
        parts.append(f"{found.found} of {found.defective} defective images found ({missed} missed)")
    if found.good:
        parts.append(
            f"{found.false_alarms} of {found.good} good ones called defective (the rate is at most "
            f"{found.fpr_limit:.0%}, at 95 %)"
        )
    return ", ".join(parts)


def choose_backend(bundle: Bundle, wanted: bool, stages: Stages) -> None:
    """Time the backends that `auto` may choose, so that the build measures with the one that the line will use.

    Args:
        bundle: calibrated and compared.
        wanted: whether to time at all.
        stages: progress, and the times.
    """
    with stages.stage("choose backend") as stage:
        figures = backends.measure(bundle, cache=False) if wanted else None
        if figures is None:
            stage.note("by the fixed order: " + ("there is no choice" if wanted else "nothing is timed"))
            return
        rows = figures.fastest()
        stage.note(", ".join(f"{row.backend} {row.precision} {row.ms:.3g} ms" for row in rows) or "none could be timed")


def keep_speeds(bundle: Bundle, wanted: bool) -> None:
    """Keep the times of `choose_backend` for the finished bundle, so that `auto` finds them on this machine."""
    if wanted:
        backends.measure(bundle)


def measure_latency(bundle: Bundle, held_out: Sequence[Sample], wanted: bool, stages: Stages) -> list[LatencyRow]:
    """Time the installed backends on a few frames, if wanted."""
    with stages.stage("latency") as stage:
        if not wanted:
            stage.note("not measured")
            return []
        frames = [frame for _, frame in named_frames(held_out[:4])]
        rows = []
        for row in measure(bundle, frames, skipped=lambda text: stages.say(f"  not timed: {text}")):
            rows.append(row)
            stage.note(f"{row.backend} {row.precision} {row.median_ms:.0f} ms")
    return rows
