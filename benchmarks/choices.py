"""Does `--select` take the configuration that finds most of the real defects? Simulated and real defects compared.

    python benchmarks/choices.py --data DATA [--categories cookie,screw] [--select auto] [--weights packaged]
                                [--frames 60] [--cache DIR] [--work DIR] [--out FILE]

For each configuration of a category:

- what the choice sees, from simulated defects and good images: image ROC-AUC with every kind, size and contrast
  weighted equally, and by how many standard errors it is ahead of the given configuration;
- what the choice does not see, from the test set: image ROC-AUC, PRO-AUC, found and rejected at the threshold.

Both are of the same model, fitted on the part of the images that the choice leaves for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.errors import SaaeError
from saae_runtime.terminal import Stages
from saae_train.config import FitConfig, preset

HEADINGS = (
    "category",
    "configuration",
    "simulated image ROC",
    "ahead",
    "simulated found",
    "image ROC",
    "PRO",
    "found",
    "rejected",
)


def measure(
    data: Path,
    name: str,
    config: FitConfig,
    select: str,
    weights: str | None,
    frames: int,
    cache: Path | None,
    work: Path,
) -> list[dict[str, Any]]:
    """The rows of one category; `config` is the configuration whose changes are tried.

    Raises:
        SaaeError: of the kind that a fit, the self-test or the evaluation raises.
    """
    from saae_export.pipeline.images import Request
    from saae_export.pipeline.options import BuildOptions
    from saae_export.pipeline.select import choices_of, possible_configs, try_configs
    from saae_runtime.terminal import log
    from saae_train.data.category import find_category
    from saae_train.evaluation.decisions import decide
    from saae_train.evaluation.evaluate import evaluate
    from saae_train.selftest.choose import Tried, choose

    options = BuildOptions(request=Request(name, data), config=config, weights=weights, cache=cache)
    category = find_category(data, name)
    configs, _ = possible_configs(config, choices_of(select), frames)
    stages = Stages(log(), 3 * len(configs))
    tried: list[Tried] = []
    rows: list[dict[str, Any]] = []
    for trial in try_configs(options.fit, configs, "auto", frames, category, work / name, stages):
        tried.append(trial.tried)
        pixel, image = trial.good.pixel.at(), trial.good.image.at()
        with stages.stage(f"test set: {trial.tried.name}") as stage:
            found = evaluate(trial.reference, category, threshold=pixel, image_threshold=image, progress=stage)
        scores, bad = [i.score for i in found.images], [i.is_anomalous for i in found.images]
        verdict = decide(scores, bad, image)
        rows.append(
            {
                "category": name,
                "configuration": trial.tried.name,
                "image_roc_auc": found.metric("image_roc_auc").value,
                "pro_auc": found.metric("pro_auc").value,
                "found": verdict.tpr,
                "rejected": verdict.fpr,
            }
        )
    choice = choose(tried)
    for row in rows:
        label = str(row["configuration"])
        row |= {
            "simulated_image_roc_auc": choice.separation[label],
            "ahead": choice.ahead[label],
            "simulated_found": choice.found[label],
            "taken": label == choice.name,
        }
    return rows


def table_rows(rows: list[dict[str, Any]]) -> list[list[object]]:
    """Rows for the terminal and the documents, in percent."""
    return [
        [
            row["category"],
            row["configuration"] + (" (taken)" if row["taken"] else ""),
            100 * row["simulated_image_roc_auc"],
            f"{row['ahead']:+.1f}",
            100 * row["simulated_found"],
            *(None if row[key] is None else 100 * row[key] for key in ("image_roc_auc", "pro_auc")),
            100 * row["found"],
            100 * row["rejected"],
        ]
        for row in rows
    ]


def main(
    data: Annotated[Path, typer.Option(help="folder of categories (MVTec AD tree)")],
    categories: Annotated[str, typer.Option(help="comma-separated; default: all found")] = "",
    select: Annotated[str, typer.Option(help="as of saae-export build")] = "auto",
    weights: Annotated[str | None, typer.Option(help="backbone weights: a file, cache, hub or packaged")] = None,
    frames: Annotated[int, typer.Option(help="images with a simulated defect")] = 60,
    cache: Annotated[Path | None, typer.Option(help="cache of features")] = None,
    work: Annotated[Path, typer.Option(help="folder of fitted models")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Compare the choice by simulated defects with real ones; print and write the table after every category."""
    from saae_train.data.category import list_categories

    common.print_machine()
    rows: list[dict[str, Any]] = []
    target = out or common.RESULTS / "choices.json"
    try:
        for name in [n for n in categories.split(",") if n] or list_categories(data):
            rows += measure(data, name, preset("fast"), select, weights, frames, cache, work)
            common.write_result(
                common.result("choices", rows, inside="simulated: what the choice sees; the rest: the test set"), target
            )
            common.print_table("choices", HEADINGS, table_rows(rows), [f"Written to {target}"])
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
