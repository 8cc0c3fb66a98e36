"""The study: its variants are valid and different, it resumes, and its table says what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import write_square_set
from typer import Typer
from typer.testing import CliRunner

from benchmarks import study
from saae_train.cli.options import make_config
from saae_train.data.category import find_category
from saae_train.experiments.experiment import Experiment, images_digest


def row(
    variant: str, seed: int, pixel: float, pro: float | None = 0.9, category: str = "cookie", **base: Any
) -> dict[str, Any]:
    config = make_config("fast", fixed={**base, **study.VARIANTS[variant], "seed": seed})
    metrics = {"pixel_roc_auc": pixel, "pro_auc": pro, "image_roc_auc": 1.0}
    return {
        **json.loads(json.dumps(Experiment("data", category, config).settings())),
        "variant": variant,
        "overall": {"metrics": {name: {"value": value} for name, value in metrics.items()}},
    }


def test_every_variant_is_one_change_and_no_two_are_the_same() -> None:
    default = make_config("fast").to_json()
    seen = []
    for name, changes in study.VARIANTS.items():
        config = make_config("fast", **changes).to_json()
        different = {key for key in default if config[key] != default[key]}
        entailed = {"memory", "held_out"} if "score" in changes else set()  # the memory belongs to its score
        if "input_size" in changes:
            entailed.add("follow_shape")  # a size that is named is kept
        assert different <= set(changes) | {"epochs"} | entailed, name
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


def test_variants_are_compared_with_the_default_that_they_change() -> None:
    rows = [row("default", 0, 0.90), row("k = 160", 0, 0.91), row("200 steps", 0, 0.85)]
    alone = study.table_rows(rows)
    short = [
        row("default", 0, 0.80, steps=100),
        row("k = 160", 0, 0.83, steps=100),
        row("200 steps", 1, 0.85, steps=100),
    ]
    mixed = {line[1]: line for line in study.table_rows([*rows, *short])}
    assert [line[1] for line in alone] == ["default", "k = 160", "200 steps"]
    whole = f"(steps {make_config('fast').steps})"
    assert mixed[f"default {whole}"][2:5] == [1, "90.00", None]
    assert mixed[f"k = 160 {whole}"][2:5] == [1, "91.00", "+1.00"]
    assert mixed["k = 160 (steps 100)"][2:5] == [1, "83.00", "+3.00"]
    # What it starts from is the same with either schedule, since it sets its own.
    assert mixed["200 steps (steps 100)"][2] == mixed[f"200 steps {whole}"][2] == 2


def test_a_variant_that_is_listed_no_more_keeps_its_place() -> None:
    old = {**row("no smoothing", 0, 0.95, steps=200), "variant": "an older name"}
    table = {line[1]: line for line in study.table_rows([old, row("default", 0, 0.90, steps=200)])}
    assert table["an older name"][2:5] == [1, "95.00", "+5.00"]


def test_stopped_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, int]] = []

    def fresh(experiment: Experiment) -> dict[str, Any]:
        run.append((json.dumps(experiment.config.to_json()), experiment.config.seed))
        if len(run) == 3:
            raise KeyboardInterrupt
        found = row("default", 0, 0.9)
        digest = images_digest(find_category(experiment.data, experiment.category))
        return {**found, **json.loads(json.dumps(experiment.settings())), "images": digest}

    write_square_set(tmp_path / "data", "cookie")

    monkeypatch.setattr(study, "run_fresh", fresh)
    app = Typer()
    app.command()(study.main)
    words = [
        "--data",
        str(tmp_path / "data"),
        "--seeds",
        "0,1",
        "--variants",
        "default,k = 160",
        "--out",
        str(tmp_path / "study.json"),
    ]
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
