"""Which choices of the default preset matter: changes one at a time, with several seeds, on real categories.

    python benchmarks/study.py --data MVTEC_TREE [--categories cookie] [--seeds 0,1,2] [--variants default,...]
                               [--set KEY=VALUE] [--cache DIR] [--out FILE] [--list]

Every experiment is one fit in a fresh process (saae_train/experiments/experiment.py) with the `fast` preset and one
change. `--set` changes the base of all variants, the default included (for example a shorter schedule). All variants
of one seed run before the next seed, and an experiment that is in the result file is not run again, so a stopped study
resumes. The table gives mean and standard deviation over seeds, and the difference from the default over the seeds
that both have, with the standard error of that difference.

Choosing by these numbers is choosing on test images: the table overrates a variant that was chosen by it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.quality import finished
from saae_runtime.errors import ConfigError, SaaeError
from saae_train.cli.options import make_config, parse_changes, parse_seeds
from saae_train.experiments.experiment import Experiment, is_same, run_fresh

DEFAULT = "default"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "batch of 16": {"batch": 16},
    "raw channels": {"standardise": False},
    "components scaled by power 1/4": {"component_power": 0.25},
    "no transformer (CAE)": {"transformer": False},
    "layers 3-7": {"layers": (3, 4, 5, 6, 7)},
    "loss l2": {"loss": "l2"},
    "score joint": {"score": "joint"},
    "score cosine": {"score": "cosine"},
    "k = 160": {"components": 160},
    "layer 6 alone": {"layers": (6,), "components": 160},
    "280 px": {"input_size": (280, 280)},
    "392 px": {"input_size": (392, 392)},
    "200 steps": {"steps": 200},
    "V up to 48": {"latent_limit": 48},
    "k = 640": {"components": 640},
    "layers 5-8": {"layers": (5, 6, 7, 8)},
    "V for 90 % up to 192": {"keep": 0.9, "latent_limit": 192},
    "MLP of V": {"mlp_ratio": 1},
    "score l2": {"score": "l2"},
    "no smoothing": {"smoothing": 0.0},
    "800 steps": {"steps": 800},
}
"""Name -> what differs from the `fast` preset."""

METRICS = ("pixel_roc_auc", "pro_auc", "image_roc_auc")


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """One row per category, base and variant: seeds, then mean ± deviation and difference from the default, in percent.

    A variant is compared with its own default only. If a category has rows on several bases (another `--set`, other
    images or weights), the variant's label shows the fields in which they differ.
    """
    table: list[list[object]] = []
    for category in dict.fromkeys(row["category"] for row in rows):
        groups = _groups([row for row in rows if row["category"] == category])
        for base, members in groups:
            label = _label(base, [other for other, _ in groups])
            names = dict.fromkeys([*VARIANTS, *(row["variant"] for row in members)])
            values = {
                variant: {
                    row["config"]["seed"]: [_percent(row, name) for name in METRICS]
                    for row in members
                    if row["variant"] == variant
                }
                for variant in names
            }
            for variant, found in values.items():
                if found:
                    own = np.array(list(found.values()), float)
                    shared = [seed for seed in found if seed in values[DEFAULT]]
                    gaps = np.array([np.subtract(found[seed], values[DEFAULT][seed]) for seed in shared], float)
                    line: list[object] = [category, variant + label, len(own)]
                    for index in range(len(METRICS)):
                        line.append(_spread(own[:, index]))
                        line.append(None if variant == DEFAULT or not shared else _gap(gaps[:, index]))
                    table.append(line)
    return table


Group = tuple[dict[str, Any], list[Mapping[str, Any]]]
"""The base of a group of variants, and their rows."""


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The rows of a category by their base. A variant's change hides the base's value of that field, so it belongs to
    every group with which it agrees in the other fields."""
    groups: list[Group] = []
    for row in sorted(rows, key=lambda row: row["variant"] != DEFAULT):  # a default row hides nothing
        whole = _whole(row)
        base = {key: value for key, value in whole.items() if key not in _changed(row, whole, groups)}
        agreeing = [g for g in groups if all(base.get(key, value) == value for key, value in g[0].items())]
        for _, members in agreeing:
            members.append(row)
        if not agreeing:
            groups.append((base, [row]))
    return groups


def _whole(row: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a row's numbers depend on, except the seed."""
    config = {key: value for key, value in row["config"].items() if key != "seed"}
    return config | {key: row[key] for key in ("weights", "images") if row.get(key) is not None}


def _changed(row: Mapping[str, Any], whole: Mapping[str, Any], groups: Sequence[Group]) -> set[str]:
    """Fields that a row's variant changes; for a variant that no longer exists, those in which it differs from the
    nearest default."""
    changes = row.get("changes", VARIANTS.get(row["variant"]))
    if changes is None:
        gaps = [{key for key, value in base.items() if whole.get(key, value) != value} for base, _ in groups]
        changes = min(gaps, key=len, default=set())
    found = set(changes)
    return found | {"steps", "epochs"} if found & {"steps", "epochs"} else found


def _label(base: Mapping[str, Any], bases: Sequence[Mapping[str, Any]]) -> str:
    """The fields in which the bases differ, in brackets; empty for a single base."""
    different = [key for key in base if len({json.dumps(other.get(key)) for other in bases}) > 1]
    words = [f"{key} {str(base[key])[:8] if key == 'images' else json.dumps(base[key])}" for key in different]
    return f" ({', '.join(words)})" if words else ""


HEADINGS = ("category", "variant", "seeds", *(text for name in ("pixel ROC-AUC", "PRO-AUC", "image ROC-AUC")
            for text in (name, "to default")))  # fmt: skip


def _percent(row: Mapping[str, Any], name: str) -> float:
    value = row["overall"]["metrics"][name]["value"]
    return float("nan") if value is None else 100 * value


def _spread(values: np.ndarray) -> str | None:
    if not np.isfinite(values).all():
        return None
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def _gap(values: np.ndarray) -> str | None:
    if not np.isfinite(values).all():
        return None
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{values.mean():+.2f}{error}"


def main(
    data: Annotated[Path | None, typer.Option(help="folder of categories (MVTec AD tree)")] = None,
    categories: Annotated[str, typer.Option(help="comma-separated")] = "cookie",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    variants: Annotated[str, typer.Option(help="comma-separated; default: all, see --list")] = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration of all variants, repeatable")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="backbone weights: a file, cache, hub or packaged")] = None,
    cache: Annotated[Path | None, typer.Option(help="keep features here between experiments")] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="print the variants and end")] = False,
) -> None:
    """Run what is missing of the study; print and write the table after every experiment."""
    if only_list:
        for name, changes in VARIANTS.items():
            print(f"{name}: {json.dumps(changes)}")
        return
    try:
        if data is None:
            raise ConfigError("Which images?", "The study fits on real categories.", "--data FOLDER")
        chosen = [name.strip() for name in variants.split(",") if name.strip()] or list(VARIANTS)
        unknown = [name for name in chosen if name not in VARIANTS]
        if unknown:
            raise ConfigError(f"There is no variant {unknown[0]!r}.", "", "--list names them")
        base = parse_changes(change or [])
        experiments = [
            (
                variant,
                Experiment(str(data), category, make_config("fast", fixed={**base, **VARIANTS[variant], "seed": seed})),
            )
            for seed in parse_seeds(seeds)
            for category in categories.split(",")
            for variant in chosen
        ]
        kept = None if cache is None else str(cache)
        _run(
            [(name, dataclasses.replace(experiment, weights=weights, cache=kept)) for name, experiment in experiments],
            out,
        )
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


def _run(experiments: Sequence[tuple[str, Experiment]], out: Path | None) -> None:
    common.print_machine()
    target = out or common.RESULTS / "study.json"
    rows = finished(target)
    for variant, experiment in experiments:
        if any(row["variant"] == variant and is_same(row, experiment) for row in rows):
            continue
        kept = [row for row in rows if row["variant"] != variant or not is_same(row, experiment, unknown=True)]
        changes = json.loads(json.dumps(VARIANTS[variant]))
        rows = [*kept, {**run_fresh(experiment), "variant": variant, "changes": changes}]
        common.write_result(common.result("study", rows), target)
        print(f"{experiment.category}, {variant}, seed {experiment.config.seed}: done", file=sys.stderr)
    common.print_table("Study: percent, mean ± deviation over seeds", list(HEADINGS), table_rows(rows), [f"{target}"])


if __name__ == "__main__":
    typer.run(main)
