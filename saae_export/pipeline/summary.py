"""The last lines of a build: where the bundle is, how good, how fast, and what to type next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from saae_runtime.estimate import LEAST_RATE
from saae_runtime.reference import SAMPLES
from saae_runtime.shell import shell_line
from saae_runtime.thresholds import ThresholdTable
from saae_train.evaluation.ranking import METRIC_NAMES

from .measure import decision_of, verdict_line

if TYPE_CHECKING:
    from .build import BuildResult

__all__ = ["print_summary", "promise"]


def print_summary(result: BuildResult, console: Console) -> None:
    """Print the summary of a build."""
    bundle, manifest = result.where, result.bundle.manifest
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("bundle", f"{escape(str(bundle))} ({size:.0f} MB, {', '.join(manifest.precisions())})")
    rows.add_row("report", escape(str(bundle / "report.html")))
    rows.add_row("verdicts", escape(_verdicts(result)))
    rows.add_row("quality", escape(_quality(result)))
    rows.add_row("self-test", escape(_self_test(result)))
    for row in sorted(result.latency, key=lambda row: row.median_ms)[:3]:
        rows.add_row(
            "latency", f"{row.median_ms:.1f} ms median, {row.p95_ms:.1f} ms p95: {row.backend} {row.precision}"
        )
    title = f"{manifest.category}{' (SYNTHETIC demo images)' if manifest.synthetic else ''}"
    console.print(Panel(rows, title=escape(title), title_align="left", border_style="green"))
    # Outside the panel, so that it can be copied without borders.
    console.print(f"Next: {_next_command(result)}", soft_wrap=True, markup=False)


def _verdicts(result: BuildResult) -> str:
    manifest = result.bundle.manifest
    promised = promise(manifest.thresholds[manifest.precisions()[0]].image, manifest.calibration.held_out)
    decision = None if result.evaluation is None else decision_of(result.evaluation)
    return promised if decision is None else f"{verdict_line(decision)}; {promised}"


def promise(table: ThresholdTable, held_out: bool | None) -> str:
    """What the default image threshold promises, in words.

    Args:
        table: of the image threshold.
        held_out: whether the model has not seen the images behind it; None: unknown.
    """
    rate, count = table.default_fpr, table.count
    if table.rule == "log-normal":
        share = f"{1000 * rate:.3g}" if rate >= LEAST_RATE else f"about {1000 * LEAST_RATE:.3g}"
        return f"{share} of 1000 good parts rejected by the default threshold, estimated from {count} images"
    images = f"{count} {'held-out' if held_out else 'good'} images"
    images += " (the model was FITTED on some of them)" if held_out is False else ""
    if table.is_too_low(rate) or rate == 0.0:
        return f"threshold above all of {images}, so that about 1 in {count + 1} good parts is rejected"
    return f"threshold that {100 * rate:.3g} % of {images} exceed"


def _quality(result: BuildResult) -> str:
    evaluation = result.evaluation
    if evaluation is None:
        return "not measured: no test images were given"
    if not evaluation.overall.defective:
        rate = evaluation.metric("image_fpr")
        good = evaluation.overall.images
        return f"image FPR at T {rate.percent} % on {good} good test images; no defect images were given"
    parts = []
    for name in ("pixel_roc_auc", "pro_auc", "image_roc_auc"):
        metric = evaluation.metric(name)
        parts.append(f"{METRIC_NAMES[name]} {metric.percent}" + ("" if metric.value is None else " %"))
    where = "synthetic test set" if evaluation.synthetic else "test set"
    return f"{', '.join(parts)} on the {where} ({evaluation.overall.images} images)"


def _self_test(result: BuildResult) -> str:
    found = result.self_test
    if found is None:
        return "no simulated defects were tried"
    words = "BLIND, " if found.misses_easy else ""
    return (
        f"{words}SIMULATED defects found: {found.easy} large and strong, {found.balanced_text()} "
        "with every kind, size and contrast weighted equally"
    )


def _next_command(result: BuildResult) -> str:
    has_samples = any(name.startswith(f"{SAMPLES}/") for name in result.bundle.manifest.files)
    images = result.where / SAMPLES if has_samples else result.category.train[0].path.parent
    return shell_line("saae-run", result.where, images, "--overlays", "--out", "results")
