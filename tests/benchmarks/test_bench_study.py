"""The study: its variants are valid and different, it resumes, and its table says what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import study
from saae_train.cells import Cell
from saae_train.options import make_config


def row(variant: str, seed: int, pixel: float, pro: float | None = 0.9, category: str = "cookie") -> dict[str, Any]:
    config = make_config("fast", **study.VARIANTS[variant], seed=seed)
    metrics = {"pixel_roc_auc": pixel, "pro_auc": pro, "image_roc_auc": 1.0}
    return {
        **json.loads(json.dumps(Cell("data", category, config).settings())),
        "variant": variant,
        "overall": {"metrics": {name: {"value": value} for name, value in metrics.items()}},
    }


def test_every_variant_is_one_change_and_no_two_are_the_same() -> None:
    default = make_config("fast").to_json()
    seen = []
    for name, changes in study.VARIANTS.items():
        config = make_config("fast", **changes).to_json()
        different = {key for key in default if config[key] != default[key]}
        assert different <= set(changes) | {"epochs"}, name
        assert bool(different) == (name != study.DEFAULT)
        seen.append(json.dumps(config))
    assert len(set(seen)) == len(seen)


def test_table_is_mean_deviation_and_paired_difference() -> None:
    rows = [
        row("default", 0, 0.90),
        row("default", 1, 0.94),
        row("k = 160", 0, 0.91),
        row("k = 160", 1, 0.93),
        row("k = 160", 2, 0.99),
        row("loss l2", 5, 0.80, pro=None),
    ]
    table = {line[1]: line for line in study.table_rows(rows)}
    assert set(table) == {"default", "k = 160", "loss l2"}
    assert table["default"][2:5] == [2, "92.00 ± 2.83", None]
    # the difference is over the seeds that both have: +1 and -1 points
    assert table["k = 160"][2:5] == [3, "94.33 ± 4.16", "+0.00 ± 1.00"]
    assert table["loss l2"][2:5] == [1, "80.00", None]
    assert table["loss l2"][5] is None  # no PRO-AUC: no number
    assert len(study.HEADINGS) == len(table["default"])


def test_stopped_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, int]] = []

    def fresh(cell: Cell) -> dict[str, Any]:
        run.append((json.dumps(cell.config.to_json()), cell.config.seed))
        if len(run) == 3:
            raise KeyboardInterrupt
        found = row("default", 0, 0.9)
        return {**found, **json.loads(json.dumps(cell.settings()))}

    monkeypatch.setattr(study, "run_fresh", fresh)
    app = Typer()
    app.command()(study.main)
    words = ["--data", "data", "--seeds", "0,1", "--variants", "default,k = 160", "--out", str(tmp_path / "study.json")]
    CliRunner().invoke(app, words)
    assert len(json.loads((tmp_path / "study.json").read_text())["rows"]) == 2
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(run) == 5  # two, the one that was stopped, and the two that were missing
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert {(item["variant"], item["config"]["seed"]) for item in rows} == {
        (name, seed) for name in ("default", "k = 160") for seed in (0, 1)
    }


@pytest.mark.parametrize(("words", "expected"), [([], "--data"), (["--data", "x", "--variants", "k = 9"], "k = 9")])
def test_bad_words(words: list[str], expected: str) -> None:
    app = Typer()
    app.command()(study.main)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert expected in done.stderr
