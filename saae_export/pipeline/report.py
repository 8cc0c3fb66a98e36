"""The report and the heatmaps of a build: its main numbers, and the frames worth looking at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.reference import plain_name
from saae_runtime.render import save_png, sheet
from saae_runtime.result import decision
from saae_train.data.category import GOOD, Category, Sample
from saae_train.evaluation.result import Evaluation
from saae_train.selftest.result import SelfTest

from ..report.data import Example, Report, outline
from .left_out import LeftOutCalibrator, Outlier
from .measure import deployed

__all__ = ["add_examples", "add_left_out", "manifest_metrics", "write_heatmaps"]

Scored: TypeAlias = "tuple[float, Sample]"
"""Image score and image."""

_MOST_EXAMPLES = 12
_MOST_OUTLIERS = 4


def manifest_metrics(evaluation: Evaluation | None, self_test: SelfTest | None = None) -> dict[str, Any]:
    """The main numbers for the manifest; `self_test` holds the counts of simulated defects."""
    simulated = {} if self_test is None else {"self_test": self_test.summary()}
    if evaluation is None:
        return simulated
    found: dict[str, Any] = {"label": "synthetic test set" if evaluation.synthetic else "test set"}
    for name, metric in evaluation.overall.metrics.items():
        if metric.value is not None:
            found[name] = metric.value
    found["images"] = evaluation.overall.images
    found["defective"] = evaluation.overall.defective
    return found | simulated


def add_examples(report: Report, bundle: Bundle, category: Category, held_out: Sequence[Sample]) -> Report:
    """The report with examples and the calibration images' scores, all from the engine that gave the metrics."""
    with deployed(bundle) as engine:
        scores = tuple(float(engine(sample.read()).score) for sample in held_out)
        return _with_examples(report, engine, category, tuple(zip(scores, held_out, strict=True)), scores)


def add_left_out(
    report: Report,
    calibrator: LeftOutCalibrator,
    bundle: Bundle,
    category: Category,
    outliers: Sequence[Outlier],
) -> Report:
    """The report with examples, the scores behind the thresholds, and images to look at with their left-out maps.

    The scores are those of all images of the fit; shown are those of them that are at hand.
    """
    with deployed(bundle) as engine:
        tables = calibrator(engine)
        threshold, image_threshold = engine.threshold, engine.image_threshold
        there = [(tables.scores[index], sample) for index, sample in calibrator.there.items()]
        report = _with_examples(report, engine, category, there, tables.scores)
    shown = []
    for item in outliers[:_MOST_OUTLIERS]:
        frame = calibrator.there[item.index].read()
        shown.append(
            Example(
                name=item.name,
                frame=frame,
                anomaly_map=calibrator.anomaly_map(item.index, (frame.shape[0], frame.shape[1])),
                threshold=threshold,
                score=tables.scores[item.index],
                image_threshold=image_threshold,
                truth=None,
                label=GOOD,
                verdict="look at this good image: a defect? glare?",
            )
        )
    return dataclasses.replace(report, examples=[*shown, *report.examples])


def _with_examples(
    report: Report, engine: Engine, category: Category, normal: Sequence[Scored], scores: Sequence[float]
) -> Report:
    """The report with examples, some of `normal` among them, and with the scores behind the thresholds."""
    return dataclasses.replace(
        report,
        held_out_scores=tuple(scores),
        image_threshold=engine.image_threshold,
        examples=_choose_examples(engine, category, report.evaluation, normal),
        shown_with=f"{engine.backend.name}: {engine.backend.description}",
    )


def write_heatmaps(folder: Path, examples: Iterable[Example]) -> list[str]:
    """Write one picture per example (frame, heatmap, overlay side by side); return the file names."""
    names = []
    folder.mkdir(exist_ok=True)
    for number, item in enumerate(examples):
        name = f"{number:02d}-{plain_name(f'{item.label}-{Path(item.name).stem}')}.png"
        save_png(folder / name, _sheet(item))
        names.append(name)
    return names


def _choose_examples(
    engine: Engine,
    category: Category,
    evaluation: Evaluation | None,
    normal: Sequence[Scored],
) -> list[Example]:
    """Frames worth looking at: wrong decisions, the median of each defect type, the largest normal scores."""
    if evaluation is None:
        largest = sorted(normal, key=lambda item: -item[0])[:4]
        return [_example(engine, sample, "largest normal") for _, sample in largest]
    by_path = {str(sample.path): sample for sample in category.test}
    limit = engine.image_threshold
    chosen: dict[str, str] = {}
    ranked = sorted(evaluation.images, key=lambda row: row.score)
    for row in [row for row in ranked if row.is_anomalous and row.score <= limit][:3]:
        chosen[row.file] = "missed defect"
    for row in [row for row in reversed(ranked) if not row.is_anomalous and row.score > limit][:3]:
        chosen[row.file] = "false alarm"
    for label in (*category.defect_types, GOOD):
        rows = [row for row in ranked if row.label == label]
        if rows:
            middle = rows[(len(rows) - 1) // 2].file
            chosen.setdefault(middle, "typical " + ("normal" if label == GOOD else label))
    return [_example(engine, by_path[file], verdict) for file, verdict in list(chosen.items())[:_MOST_EXAMPLES]]


def _example(engine: Engine, sample: Sample, verdict: str) -> Example:
    frame = sample.read()
    result = engine(frame)
    return Example(
        name=sample.path.name,
        frame=frame,
        anomaly_map=result.anomaly_map,
        threshold=result.threshold,
        score=result.score,
        image_threshold=result.image_threshold,
        truth=sample.truth(),
        label=sample.label,
        verdict=verdict,
    )


def _sheet(item: Example) -> NDArray[np.uint8]:
    mask = outline(item)
    title = f"{item.name}: {item.verdict}, score {item.score:.4g}"
    if item.image_threshold is not None:
        title = f"{item.name}: {item.verdict}; {decision(item.score, item.image_threshold)}"
    return sheet(item.frame, item.anomaly_map, mask, item.threshold, truth=item.truth, title=title)
