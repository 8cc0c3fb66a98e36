"""False alarms and misses of each method on real categories, from the result file of quality.py.

    python benchmarks/decisions.py [benchmarks/results/quality.json]

FPR and TPR on the test images, in percent, of the image threshold at its default rate and at nominal 1 and 5 false
alarms in 100 good images. At the default also the regret: the best Youden index (TPR - FPR) that any threshold reaches
with these scores, less the index reached. All methods get their thresholds by one rule; figures are means over seeds.
"""

from __future__ import annotations

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
from saae_runtime.errors import DataError, SaaeError
from saae_train.experiments.experiment import SAAE_METHOD

HEADINGS = (
    "category",
    "method",
    "good / bad",
    "FPR, default",
    "TPR, default",
    "regret, default",
    "FPR, 1 %",
    "TPR, 1 %",
    "FPR, 5 %",
    "TPR, 5 %",
)


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """One row per category and method, over its seeds; rows without verdicts are left out."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("decisions"):
            config = {key: value for key, value in row["config"].items() if key != "seed"}
            groups.setdefault(
                json.dumps([row["category"], row["method"], config, row.get("weights"), row.get("images")]), []
            ).append(row)
    table: list[list[object]] = []
    for same in groups.values():
        config = same[0]["config"]
        name = same[0]["method"]
        if name == SAAE_METHOD:
            name = f"saae, {config['preset']}" + ("" if config["score"] == "memory" else f", score {config['score']}")
        default, one, five = ([row["decisions"][place] for row in same] for place in range(3))
        line: list[object] = [same[0]["category"], name, f"{default[0]['good']} / {default[0]['defective']}"]
        line += [_percent(default, "fpr"), _percent(default, "tpr"), _mean(default, "regret")]
        for found in (one, five):
            line += [_percent(found, "fpr"), _percent(found, "tpr")]
        table.append(line)
    return table


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{round(float(np.mean([item[key] for item in found])), 3) + 0.0:.3f}"  # no -0.000


def _percent(found: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{100 * np.mean([item[key] for item in found]):.1f}"


def main(
    file: Annotated[Path, typer.Argument(help="result file of quality.py")] = common.RESULTS / "quality.json",
) -> None:
    """Print the table of verdicts."""
    try:
        table = table_rows(finished(file))
        if not table:
            raise DataError(
                f"{file} holds no verdicts.", "", f"python benchmarks/quality.py --data MVTEC_TREE --out {file}"
            )
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    common.print_table("verdicts", HEADINGS, table)


if __name__ == "__main__":
    typer.run(main)
