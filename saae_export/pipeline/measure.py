"""What a build measures about its bundle: quality on test images, simulated defects, latency, frames to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import SimulationError, shell_line
from saae_runtime.stages import Stages
from saae_train.data.category import Category, Sample
from saae_train.evaluation.evaluate import Evaluation, evaluate
from saae_train.selftest.result import SelfTest
from saae_train.selftest.run import examples as simulated_examples
from saae_train.selftest.run import require_detection, selftest

from ..report.data import Example, LatencyRow
from .bundle import named_frames
from .fit import model_folder
from .latency import measure
from .options import BuildOptions
from .report import examples

__all__ = ["evaluated", "self_tested", "shown", "timed"]


def evaluated(bundle: Bundle, category: Category, stages: Stages) -> Evaluation | None:
    with stages.stage("evaluate") as stage:
        if not category.test:
            stage.note("no test images, so no metrics")
            return None
        with _deployed(bundle) as engine:
            done = [0]

            def score(frame: object) -> object:
                stage(done[0], len(category.test))
                done[0] += 1
                return engine(frame)  # type: ignore[call-overload]

            evaluation = evaluate(score, category, progress=False)  # type: ignore[arg-type]
            stage.note(f"{len(category.test)} test images with {engine.backend.name} {engine.backend.precision}")
    stages.console.print(evaluation.table())
    return evaluation


def self_tested(
    options: BuildOptions, bundle: Bundle, category: Category, held_out: Sequence[Sample], work: Path, stages: Stages
) -> tuple[SelfTest | None, list[Example]]:
    """Simulated defects on the held-out images, and one example of each kind; the second gate of a build.

    Raises:
        SelfTestError: the model misses large, strong simulated defects, and was not allowed to.
    """
    with stages.stage("self-test (simulated defects)") as stage:
        if not options.self_test:
            stage.note("not asked for")
            return None, []
        with _deployed(bundle) as engine:
            try:
                result = selftest(
                    engine,
                    held_out,
                    frames=options.self_test_frames,
                    synthetic=category.synthetic,
                    progress=stage,
                )
            except SimulationError as error:  # nothing is wrong with the model
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
                for defect, drawn in simulated_examples(engine, held_out, result, per_kind=1)
            ]
            stage.note(f"{result.share()} found with {engine.backend.name} {engine.backend.precision}")
    stages.console.print(result.table())
    if result.misses_easy and options.allow_blind:
        stages.say(f"  The model is BLIND: it finds {result.easy} large, strong simulated defects.", "bold yellow")
    else:
        require_detection(
            result,
            "give more or clearer pictures, or fit longer (--steps); "
            f"`{_selftest_command(options, category, work)}` shows what the model misses; "
            "--allow-blind builds it all the same",
        )
    return result, found


def _selftest_command(options: BuildOptions, category: Category, work: Path) -> str:
    """What to type to see the misses of the model that was just built from."""
    model = options.checkpoint or model_folder(options, category, work)
    images = [word for folder in options.request.normal for word in ("--normal", folder)]
    images = images or ["--data", category.root.parent]
    return shell_line("saae-train", "selftest", model, *images, "--category", category.name, "--out", work / "misses")


def timed(options: BuildOptions, bundle: Bundle, held_out: Sequence[Sample], stages: Stages) -> list[LatencyRow]:
    with stages.stage("latency") as stage:
        if not options.measure_latency:
            stage.note("not measured")
            return []
        frames = [frame for _, frame in named_frames(held_out[:4])]
        rows = []
        for row in measure(bundle, frames, skipped=lambda text: stages.say(f"  not timed: {text}")):
            rows.append(row)
            stage.note(f"{row.backend} {row.precision} {row.median_ms:.0f} ms")
    return rows


class Shown(NamedTuple):
    """Examples, the calibration images' scores, the image threshold, and what computed them, in words."""

    examples: list[Example]
    held_out_scores: tuple[float, ...]
    image_threshold: float
    engine: str


def shown(bundle: Bundle, category: Category, evaluation: Evaluation | None, held_out: Sequence[Sample]) -> Shown:
    """What the report shows, all from the engine that gave the metrics."""
    with _deployed(bundle) as engine:
        return Shown(
            examples(engine, category, evaluation, held_out),
            tuple(engine(sample.read()).score for sample in held_out),
            engine.image_threshold,
            f"{engine.backend.name}: {engine.backend.description}",
        )


def _deployed(bundle: Bundle) -> Engine:
    """The engine as `saae-run` would open it here."""
    return Engine(bundle, verify=False, cache=False)
