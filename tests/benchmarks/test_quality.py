"""benchmarks/quality.py on a tiny category with a small random backbone: real experiments, resumed, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import TINY_CHANGES, write_square_set
from typer import Typer
from typer.testing import CliRunner

from benchmarks import quality
from benchmarks.baselines import BASELINES, baseline
from saae_runtime.errors import DataError, SaaeError
from saae_train.cli.options import make_config
from saae_train.data.category import Sample
from saae_train.experiments.experiment import Experiment, is_same, run_experiment, run_fresh

pytestmark = pytest.mark.needs("timm")

WORDS = [
    word
    for key, value in TINY_CHANGES.items()
    for word in ("--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}")
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_square_set(tmp_path_factory.mktemp("data"))


def experiment(tree: Path, method: str, category: str = "part", **more: object) -> Experiment:
    return Experiment(str(tree), category, make_config("fast", **{**TINY_CHANGES, **more}), method, "random")


@pytest.mark.parametrize("method", ["saae", "pca", "knn"])
def test_an_experiment_measures_what_it_says(tree: Path, method: str) -> None:
    row = json.loads(json.dumps(run_experiment(experiment(tree, method), quality.fit_method), allow_nan=False))
    metrics = row["overall"]["metrics"]
    assert 0 <= metrics["pixel_roc_auc"]["value"] <= 1
    assert metrics["pixel_fpr"]["value"] is not None
    assert metrics["image_tpr"]["value"] is not None
    assert (row["fit_images"], row["held_out_images"]) == (10, 0)  # a baseline sees as many images as the default
    assert row["test_images"] == 6
    assert [s["label"] for s in row["by_type"]] == ["spot"]
    assert row["config"]["layers"] == [1, 2]
    if method != "saae":  # even random features show a white square
        assert metrics["pixel_roc_auc"]["value"] > 0.9
        assert metrics["image_roc_auc"]["value"] == 1.0
    assert is_same(row, experiment(tree, method))
    assert not is_same(row, experiment(tree, method, seed=1))


@pytest.mark.parametrize("method", ["saae", "padim"])
def test_without_a_memory_all_methods_hold_out_the_same_images(tree: Path, method: str) -> None:
    row = run_experiment(experiment(tree, method, score="cosine"), quality.fit_method)
    assert (row["fit_images"], row["held_out_images"]) == (6, 4)


@pytest.mark.parametrize("method", BASELINES)
def test_no_baseline_has_seen_what_it_is_calibrated_on(method: str) -> None:
    """Image 7 is unlike the others, and 6 is its copy: left out together, both stand out; fitted, neither would."""
    features = np.random.default_rng(0).normal(size=(10, 12, 5)).astype(np.float16)
    features[6:8] = features[6] + 8
    samples = [Sample(Path(f"{index}.png"), "good", None, False) for index in range(10)]
    found = quality.cross_fitted(method, features, (3, 4), samples)
    assert found.names == tuple(f"{index}.png" for index in range(10))
    means = found.scores.numpy().mean(axis=(1, 2))
    assert set(np.argsort(means)[-2:]) == {6, 7}
    model, change = baseline(method, features[:8])
    expected = model.score(change.apply(features[9])).reshape(3, 4)
    np.testing.assert_array_equal(found.scores[9].numpy(), expected)


def run(arguments: list[str]) -> tuple[int, str]:
    app = Typer()
    app.command()(quality.main)
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    return done.exit_code, done.output


def test_a_finished_experiment_is_not_run_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quality.json"
    arguments = ["--data", str(tree), "--weights", "random", "--out", str(out), *WORDS]
    monkeypatch.setattr(quality, "run_fresh", run_experiment)  # here; the next test has a process of its own
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca"])
    assert code == 0, text
    first = json.loads(out.read_text())
    assert [r["method"] for r in first["rows"]] == ["pca"]
    assert first["machine"]["cores"] >= 1

    def refuse(experiment: Experiment, *more: object) -> dict[str, object]:
        raise SaaeError(f"ran {experiment.method}")

    monkeypatch.setattr(quality, "run_fresh", refuse)
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca"])
    assert code == 0, text
    assert json.loads(out.read_text()) == first
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca", "--seeds", "0,1"])
    assert (code, "ran pca" in text) == (2, True)
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca", "--again"])
    assert code == 2
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca,pca-raw"])
    assert (code, "ran pca-raw" in text) == (2, True)
    assert json.loads(out.read_text()) == first


def test_an_experiment_that_fails_says_why(tree: Path) -> None:
    with pytest.raises(DataError, match="nothere"):
        run_fresh(experiment(tree, "pca", "nothere"), quality.fit_method)


def test_bad_options_are_named(tree: Path) -> None:
    code, text = run(["--data", str(tree), "--baseline", "magic"])
    assert code == 2
    assert "magic" in text


def test_the_paper_stands_beside_its_categories() -> None:
    def row(category: str, method: str, value: float | None, seed: int = 0) -> dict[str, object]:
        metric = {"value": value}
        names = ("pixel_roc_auc", "pro_auc", "pixel_average_precision", "image_roc_auc")
        return {
            "category": category,
            "method": method,
            "config": {"preset": "fast", "seed": seed},
            "overall": {"metrics": dict.fromkeys(names, metric)},
            "fit_seconds": 1.0,
            "peak_memory_gib": 2.0,
        }

    table = quality.table_rows([row("bottle", "saae", 0.98765), row("part", "pca", None), row("bottle", "knn", 0.5)])
    assert [r[:4] for r in table] == [
        ["bottle", "saae, fast", "98.77", "98.77"],
        ["bottle", "knn", "50.00", "50.00"],
        ["bottle", "the paper", "97.9", "94.3"],
        ["part", "pca", None, None],
    ]
    three = [row("cable", "saae", value, seed) for seed, value in enumerate((0.90, 0.92, 0.94))]
    assert quality.table_rows(three)[0][1:3] == ["saae, fast, 3 seeds", "92.00 ± 2.00"]
    assert quality.table_rows([*three, row("cable", "saae", None, 3)])[0][2] is None
    mean = np.mean([pixel for pixel, _ in quality.PAPER.values()]), np.mean([pro for _, pro in quality.PAPER.values()])
    assert mean == (pytest.approx(97.9, abs=0.06), pytest.approx(93.6, abs=0.06))  # as the tables' last rows say
