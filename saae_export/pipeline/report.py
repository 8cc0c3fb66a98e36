"""Fills the report and the heatmaps of a build from what the build found out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saae_runtime.engine import Engine
from saae_runtime.errors import shell_line
from saae_runtime.manifest import Manifest
from saae_runtime.render import save_png, sheet
from saae_train.data.category import GOOD, Category, Sample
from saae_train.evaluation.evaluate import Evaluation
from saae_train.evaluation.ranking import METRIC_NAMES, Metric
from saae_train.selftest.chart import chart
from saae_train.selftest.result import SelfTest
from saae_train.selftest.simulate import CONTRASTS, SIZES

from ..parity.compare import ParityReport
from ..parity.reference import plain_name
from ..report.data import (
    Curve,
    Example,
    Facts,
    FitHistory,
    LatencyRow,
    MetricRow,
    ParityRow,
    ReportData,
    Scores,
    SelfTestView,
    ThresholdSet,
)

__all__ = ["Findings", "examples", "manifest_metrics", "report_data", "write_heatmaps"]

_SHOWN = (
    "pixel_roc_auc",
    "pro_auc",
    "image_roc_auc",
    "pixel_average_precision",
    "pixel_fpr_good",
    "pixel_fpr_halo",
    "pixel_tpr",
    "image_fpr",
    "image_tpr",
)
_MOST_EXAMPLES = 12


@dataclass(frozen=True)
class Findings:
    """What a build measured, besides what the manifest holds.

    Attributes:
        held_out_scores: image scores of the calibration images, from the engine that gave the metrics.
        image_threshold: that engine's.
        evaluation: on the test set; None where there are no defect images.
        parity: one report per artefact that could be run.
        not_compared: artefact file -> why it could not be compared here.
        latency: one row per backend and precision.
        examples: frames worth looking at, most telling first.
        self_test: on simulated defects; None where there is none.
        simulated: frames with simulated defects.
        fit: facts of the fit, from the checkpoint.
        source: where the images were found, in words.
        calibrated_with: backend that thresholds were computed on.
        shown_with: backend, arithmetic and file that metrics and examples were computed with.
    """

    held_out_scores: Sequence[float]
    image_threshold: float
    evaluation: Evaluation | None
    parity: Sequence[ParityReport]
    not_compared: Mapping[str, str]
    latency: Sequence[LatencyRow]
    examples: Sequence[Example]
    self_test: SelfTest | None = None
    simulated: Sequence[Example] = ()
    fit: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    calibrated_with: str = ""
    shown_with: str = ""


def manifest_metrics(evaluation: Evaluation | None, self_test: SelfTest | None = None) -> dict[str, Any]:
    """The headline numbers as the manifest keeps them; `self_test` holds what was found of simulated defects."""
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


def report_data(manifest: Manifest, findings: Findings, bundle: str) -> ReportData:
    """Everything for `saae_export.report.html.write_report`."""
    evaluation = findings.evaluation
    missing = {}
    if evaluation is None:
        missing["metrics"] = "no defect images were given"
    if findings.self_test is None:
        missing["self_test"] = "the self-test was not asked for, or no defect could be drawn onto these images"
    if not findings.latency:
        missing["latency"] = "it was not measured"
    test_good = [row.score for row in evaluation.images if not row.is_anomalous] if evaluation else []
    defective = [row.score for row in evaluation.images if row.is_anomalous] if evaluation else []
    return ReportData(
        category=manifest.category,
        created=manifest.created,
        bundle=bundle,
        synthetic=manifest.synthetic,
        notes=list(evaluation.notes) if evaluation else [],
        facts=_facts(manifest, findings),
        thresholds=[ThresholdSet(name, pair.pixel, pair.image) for name, pair in manifest.thresholds.items()],
        scores=Scores(
            list(findings.held_out_scores),
            test_good,
            defective,
            findings.image_threshold,
            "normal, held out" if manifest.calibration.held_out else "normal, fitted on",
        ),
        metrics=_metric_rows(evaluation) if evaluation else [],
        curves=_curves(evaluation) if evaluation else [],
        fit=_fit(findings.fit),
        self_test=_self_test(findings),
        simulated=[f"{_banner(findings.self_test)} See the self-test below; nothing else in this report is simulated."]
        if findings.self_test is not None
        else [],
        parity=_parity_rows(manifest, findings),
        latency=findings.latency,
        worst=findings.examples,
        missing=missing,
        next_commands=[
            ("score images with it", shell_line("saae-run", bundle, "IMAGES", "--overlays", "--out", "results")),
            ("check it on another machine", shell_line("saae-export", "verify", bundle)),
            ("see what this machine can run", shell_line("saae-export", "doctor", bundle)),
        ],
    )


def examples(
    engine: Engine, category: Category, evaluation: Evaluation | None, held_out: Sequence[Sample]
) -> list[Example]:
    """Frames worth looking at: what was decided wrongly, the median of each defect type, the largest normal ones."""
    if evaluation is None:
        scored = sorted(((_score(engine, sample), sample) for sample in held_out), key=lambda item: -item[0])
        return [_example(engine, sample, "largest normal") for _, sample in scored[:4]]
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


def write_heatmaps(folder: Path, shown: Iterable[Example]) -> list[str]:
    """Writes one picture per example (frame, heatmap, overlay side by side); returns the file names."""
    names = []
    folder.mkdir(exist_ok=True)
    for number, item in enumerate(shown):
        name = f"{number:02d}-{plain_name(f'{item.label}-{Path(item.name).stem}')}.png"
        save_png(folder / name, _sheet(item))
        names.append(name)
    return names


def _score(engine: Engine, sample: Sample) -> float:
    return float(engine(sample.read()).score)


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


def _facts(manifest: Manifest, findings: Findings) -> list[Facts]:
    model, backbone, frame = manifest.model, manifest.backbone, manifest.frame
    calibration = manifest.calibration
    size = "the camera's own, resized inside the graph" if frame.baked else "the model's"
    return [
        Facts(
            "Data",
            {
                "images": findings.source,
                "calibrated on": f"{calibration.images} {'held-out ' if calibration.held_out else ''}normal images",
                "calibration digest": calibration.digest,
                "thresholds computed with": findings.calibrated_with,
                "metrics and examples computed with": findings.shown_with,
            },
        ),
        Facts(
            "Backbone",
            {"name": backbone.name, "weights": backbone.weights_source, "weights sha256": backbone.weights_sha256},
        ),
        Facts(
            "Model",
            {
                "frame": f"{frame.height} x {frame.width} pixels, {size}",
                "model input": f"{model.height} x {model.width} pixels, patch {model.patch}",
                "layers": list(model.layers),
                "autoencoder": model.autoencoder,
                "latent V": model.latent_dim,
                "components": model.components,
                "loss": model.loss,
                "score": model.score,
                "preset": model.preset,
            },
        ),
        Facts("Versions", {"saae": manifest.saae_version, **manifest.tools}),
    ]


def _metric_rows(evaluation: Evaluation) -> list[MetricRow]:
    rows = []
    for subset in (evaluation.overall, *evaluation.by_type):
        shown = {METRIC_NAMES[name]: subset.metrics[name] for name in _SHOWN if name in subset.metrics}
        rows.append(
            MetricRow(
                subset.label,
                {title: metric.value for title, metric in shown.items()},
                subset.images,
                {title: metric.reason for title, metric in shown.items() if metric.value is None},
            )
        )
    return rows


def _curves(evaluation: Evaluation) -> list[Curve]:
    return [
        Curve(
            item.title, item.x, item.y, item.x_label, item.y_label, _value(item.area), item.limit, item.chance, item.dot
        )
        for item in evaluation.curves
        if len(item.x)
    ]


def _value(metric: Metric) -> float | None:
    return metric.value


def _fit(facts: Mapping[str, Any]) -> FitHistory | None:
    """The loss curve from a checkpoint's facts: [step, loss] pairs."""
    pairs = facts.get("loss") or []
    if not pairs:
        return None
    seconds = facts.get("seconds_fit")
    return FitHistory(
        loss=[float(loss) for _, loss in pairs],
        steps=[float(step) for step, _ in pairs],
        seconds=None if seconds is None else float(seconds),
    )


def _banner(result: SelfTest) -> str:
    found = result.easy
    return f"Defects were drawn by a program onto normal images: {found} large, strong ones were found."


def _self_test(findings: Findings) -> SelfTestView | None:
    result = findings.self_test
    if result is None:
        return None
    names = {"size": tuple(SIZES), "contrast": tuple(CONTRASTS)}
    rows = []
    for kind in (*result.kinds, None):
        shares = [result.share(kind, size=name) for name in names["size"]]
        shares += [result.share(kind, contrast=name) for name in names["contrast"]]
        shares += [result.share(kind), result.share(kind, marked=True)]
        rows.append((kind or "all", [f"{share.found} of {share.count}" if share.count else "-" for share in shares]))
    return SelfTestView(
        chart=chart(result),
        columns=[*names["size"], *names["contrast"], "all", "marked"],
        rows=rows,
        easy=result.easy.value if result.judged else None,
        misses_easy=result.misses_easy,
        summary=f"Large and strong: {result.easy} found. Every kind, size and contrast weighted alike: "
        f"{result.balanced_text()}. "
        f"Simulated pixel ROC-AUC {result.pixel_roc_auc.percent}, PRO-AUC {result.pro_auc.percent}.",
        notes=result.notes(),
        examples=findings.simulated,
    )


def _parity_rows(manifest: Manifest, findings: Findings) -> list[ParityRow]:
    return [
        ParityRow(item.file, item.precision, item.parity, findings.not_compared.get(item.file, "not run here"))
        if item.parity is None
        else ParityRow(item.file, item.precision, item.parity)
        for item in manifest.artefacts
    ]


def _sheet(item: Example) -> NDArray[np.uint8]:
    mask = item.anomaly_map > np.float32(item.threshold)
    title = f"{item.name}: {item.verdict}, score {item.score:.4g}"
    return sheet(item.frame, item.anomaly_map, mask, item.threshold, truth=item.truth, title=title)
