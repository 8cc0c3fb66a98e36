"""Quality of a preset on real categories, beside the paper's figures and baselines on the same features.

    python benchmarks/quality.py --data MVTEC_TREE [--categories bottle,cookie] [--preset fast|paper]
                                 [--baseline pca,pca-raw,padim,knn] [--seeds 0,1,2] [--set KEY=VALUE]
                                 [--out FILE] [--again]

Each experiment (category, method and seed) runs in a fresh process (saae_train/experiments/experiment.py): it fits,
calibrates the thresholds and evaluates on the test set at the images' own resolution. A preset with a memory is
fitted on all normal images and calibrated on each of them left out of the memory. Baselines beside it are fitted on
all of them, too, and calibrated on each fifth of them, scored by a fit of the other four. Presets without a memory,
and baselines beside them, are calibrated on normal images that were held out. An experiment that is in the result
file, with the same settings on the same images, is not run again. The seed sets weights, order and split; for several
seeds the table shows mean and standard deviation.

  fit s      from the list of images to the fitted model, features included, with an empty cache (--cache keeps
             features between experiments; fit times then hold no backbone where the row says so)
  peak GiB   resident high-water mark of the experiment's process, evaluation included

Baselines (baselines.py) see the same images, backbone and layers, and their maps get the preset's smoothing too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.baselines import BASELINES, baseline
from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.geometry import gaussian_matrix, resize_frames, upsample_map
from saae_runtime.result import Scored
from saae_train.config import FitConfig
from saae_train.experiments.experiment import (
    SAAE_METHOD,
    Experiment,
    FittedMethod,
    Report,
    fit_saae,
    is_same,
    run_fresh,
)
from saae_train.experiments.paper import CLASSES, paper_table

if TYPE_CHECKING:
    from saae_train.data.category import Sample
    from saae_train.model.left_out import LeftOut
    from saae_train.model.vit import Features

PAPER = {name: tuple(paper_table(table).figures[name]["Ours"] for table in ("2", "3")) for name in CLASSES}
"""Pixel ROC-AUC and PRO-AUC in percent, the paper's Tables 2 and 3, column "Ours"."""


def fit_method(
    experiment: Experiment, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report
) -> FittedMethod:
    """The SAAE, or the baseline that the experiment names."""
    fit = fit_saae if experiment.method == SAAE_METHOD else _fit_baseline
    return fit(experiment, backbone, samples, cache, report)


def _fit_baseline(
    experiment: Experiment, backbone: Features, samples: tuple[Sample, ...], cache: Path, report: Report
) -> FittedMethod:
    import torch

    from saae_train.fitting.features import extract

    config = experiment.config
    features = extract(
        backbone,
        samples,
        cache,
        precision=config.precision,
        progress=lambda done, total, text="": report("features", done, total),
    )
    model, change = baseline(experiment.method, features.values)
    backbone.cpu()
    mean = torch.tensor(backbone.mean).view(3, 1, 1) * 255.0
    std = torch.tensor(backbone.std).view(3, 1, 1) * 255.0
    rows, columns = (gaussian_matrix(n, config.smoothing) for n in backbone.grid)

    def score(frame: NDArray[np.uint8]) -> Scored:
        pixels = torch.tensor(resize_frames(frame, backbone.input_size)).permute(2, 0, 1).float()
        with torch.inference_mode():
            f = backbone(((pixels - mean) / std)[None])[0].numpy()
        a = rows @ model.score(change.apply(f)).reshape(backbone.grid) @ columns.T
        full = upsample_map(a, (frame.shape[0], frame.shape[1]))
        return Scored(float(full.max()), full)

    facts = {"patches": int(np.prod(features.values.shape[:2])), "channels": backbone.channels}
    return FittedMethod(
        score,
        facts,
        config.replace(layers=backbone.layers, input_size=backbone.input_size),
        left_out=lambda: cross_fitted(experiment.method, features.values, backbone.grid, samples),
    )


def cross_fitted(
    method: str, features: NDArray[Any], grid: tuple[int, int], samples: Sequence[Sample], folds: int = 5
) -> LeftOut:
    """The scores of each image by a baseline that is fitted without it.

    Args:
        method: see `baseline`.
        features: of the images, N x L x U.
        grid: (h, w), h w = L.
        samples: the images.
        folds: number of fits. Each leaves out one run of images, so that frames of a burst are left out together.
    """
    import torch

    from saae_train.model.left_out import LeftOut

    scores = np.empty((len(samples), *grid), np.float32)
    for left in np.array_split(np.arange(len(samples)), min(folds, len(samples))):
        model, change = baseline(method, np.delete(features, left, axis=0))
        for index in left:
            scores[index] = model.score(change.apply(features[index])).reshape(grid)
    return LeftOut(torch.from_numpy(scores), tuple(sample.path.name for sample in samples))


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows of a result file; empty if it is missing or cannot be read."""
    try:
        rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return rows


def table_rows(rows: list[dict[str, Any]]) -> list[list[object]]:
    """Rows for the terminal, numbers in percent, the paper's figures after each category.

    Rows that differ only in the seed become one, with mean and standard deviation. If a category's rows are of
    different images, the method's label shows the first digits of the images' digest.
    """
    table: list[list[object]] = []
    for category in dict.fromkeys(r["category"] for r in rows):
        several = len({r.get("images") for r in rows if r["category"] == category}) > 1
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in (r for r in rows if r["category"] == category):
            config = {key: value for key, value in row["config"].items() if key != "seed"}
            groups.setdefault(json.dumps([row["method"], config, row.get("weights"), row.get("images")]), []).append(
                row
            )
        for same in groups.values():
            config = same[0]["config"]
            name = f"saae, {config['preset']}" if same[0]["method"] == SAAE_METHOD else same[0]["method"]
            if (
                same[0]["method"] == SAAE_METHOD
                and config["preset"] == "fast"
                and config.get("score", FitConfig.score) != FitConfig.score
            ):
                name += f", score {config['score']}"
            if several:
                name += f", images {str(same[0].get('images') or 'unknown')[:8]}"
            seconds = float(np.mean([row["fit_seconds"] for row in same]))
            peak = max(row["peak_memory_gib"] for row in same)
            table.append([category, name + _seeds(same), *_percents(same), seconds, peak])
        if category in PAPER:
            pixel, pro = PAPER[category]
            table.append([category, "the paper", f"{pixel:.1f}", f"{pro:.1f}", None, None, None, None])
    return table


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    return f", {len(rows)} seeds" if len(rows) > 1 else ""


def _percents(rows: Sequence[dict[str, Any]]) -> list[str | None]:
    """Pixel ROC-AUC, PRO-AUC, pixel AP and image ROC-AUC over the seeds; None where one seed has no value."""
    found: list[str | None] = []
    for key in ("pixel_roc_auc", "pro_auc", "pixel_average_precision", "image_roc_auc"):
        values = [row["overall"]["metrics"][key]["value"] for row in rows]
        if any(value is None for value in values):
            found.append(None)
        elif len(values) == 1:
            found.append(f"{100 * values[0]:.2f}")
        else:
            found.append(f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}")
    return found


def _run(experiment: Experiment) -> dict[str, Any]:
    """An experiment in a fresh process, its progress on the terminal; its error names the experiment."""
    from rich.console import Console
    from rich.progress import Progress

    title = f"{experiment.category} {experiment.method}"
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total)

        try:
            return run_fresh(experiment, fit_method, show)
        except SaaeError as error:
            raise type(error)(f"{title} failed: {error.what}", error.why, error.cure) from error


def main(
    data: Annotated[Path, typer.Option(help="folder of categories (MVTec AD tree)")],
    categories: Annotated[str, typer.Option(help="comma-separated; default: all found")] = "",
    preset: Annotated[str, typer.Option(help="fast or paper")] = "fast",
    baselines: Annotated[str, typer.Option("--baseline", help=f"comma-separated: {', '.join(BASELINES)}")] = "",
    only_baselines: Annotated[bool, typer.Option(help="leave the SAAE out")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration, repeatable")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="backbone weights: a file, cache, hub or packaged")] = None,
    cache: Annotated[Path | None, typer.Option(help="keep features here between experiments")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    again: Annotated[bool, typer.Option(help="run experiments that are in the result file, too")] = False,
    seeds: Annotated[str, typer.Option(help="comma-separated, e.g. 0,1,2; default: the configuration's own")] = "",
) -> None:
    """Measure quality; print and write the table after every experiment."""
    from saae_train.cli.options import make_config, parse_changes, parse_seeds
    from saae_train.data.category import list_categories

    common.print_machine()
    target = out or common.RESULTS / "quality.json"
    try:
        names = [n for n in categories.split(",") if n] or list_categories(data)
        chosen = [b for b in baselines.split(",") if b]
        for name in chosen:
            if name not in BASELINES:
                raise ConfigError(f"There is no baseline {name!r}.", "", f"one of: {', '.join(BASELINES)}")
        config = make_config(preset, fixed=parse_changes(change or []))
        methods = ([] if only_baselines else [SAAE_METHOD]) + chosen
        kept = None if cache is None else str(cache)
        experiments = [
            Experiment(str(data), name, config.replace(seed=seed), method, weights, kept)
            for name in names
            for method in methods
            for seed in parse_seeds(seeds) or (config.seed,)
        ]
        rows = finished(target)
        shown: list[dict[str, Any]] = []
        for experiment in experiments:
            old = next((r for r in rows if is_same(r, experiment)), None)
            row = old if old is not None and not again else _run(experiment)
            if row is not old:
                rows = [r for r in rows if not is_same(r, experiment, unknown=True)] + [row]
                common.write_result(
                    common.result(
                        "quality",
                        rows,
                        paper={"pixel_roc_auc_and_pro_auc_percent": PAPER},
                        inside="fit_seconds: list of images to fitted model, features included, fresh process, "
                        "empty cache unless features_cached",
                    ),
                    target,
                )
            shown.append(row)
            title = f"{experiment.category} {experiment.method}, seed {experiment.config.seed}"
            print(f"{title}: {' / '.join(str(v) for v in _percents([row]))}", file=sys.stderr)
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    common.print_table(
        "Quality: areas under the curve in percent (PRO up to 30 % FPR)",
        ["category", "method", "pixel ROC", "PRO", "pixel AP", "image ROC", "fit s", "peak GiB"],
        table_rows(shown),
        [
            "The paper: ViT-B/16 at 384 pixels on the original images (Tables 2 and 3).",
            f"Written to {target}",
        ],
    )


if __name__ == "__main__":
    typer.run(main)
