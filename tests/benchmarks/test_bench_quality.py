"""benchmarks/quality.py on a tiny category with a small random backbone: real cells, resumed, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

pytest.importorskip("timm", reason="needs the extra `train`")

from benchmarks import quality
from saae_runtime.errors import ConfigError, SaaeError

CHANGES = {
    "backbone": "vit_tiny_patch16_224",
    "layers": (1, 2),
    "input_size": (64, 64),
    "components": 16,
    "latent": 6,
    "steps": 3,
    "batch": 2,
    "precision": "fp32",
}
WORDS = [
    word
    for key, value in CHANGES.items()
    for word in ("--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}")
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One category of 10 + 3 + 3 gray pictures with a bright square as the defect."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def save(path: Path, square: bool = False) -> None:
        picture = rng.integers(80, 120, (70, 64, 3))
        if square:
            picture[20:50, 16:48] = 250
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)

    for i in range(10):
        save(root / "part/train/good" / f"{i}.png")
    for i in range(3):
        save(root / "part/test/good" / f"{i}.png")
        save(root / "part/test/spot" / f"{i}.png", square=True)
        mask = np.zeros((70, 64), np.uint8)
        mask[20:50, 16:48] = 255
        path = root / "part/ground_truth/spot" / f"{i}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return root


def cell(tree: Path, method: str) -> quality.Cell:
    return quality.Cell(str(tree), "part", method, "fast", dict(CHANGES), "random")


@pytest.mark.parametrize("method", ["saae", "pca", "knn"])
def test_a_cell_measures_what_it_says(tree: Path, method: str) -> None:
    row = json.loads(json.dumps(quality.run_cell(cell(tree, method)), allow_nan=False))
    metrics = row["overall"]["metrics"]
    assert 0 <= metrics["pixel_roc_auc"]["value"] <= 1
    assert metrics["pixel_fpr"]["value"] is not None
    assert metrics["image_tpr"]["value"] is not None
    assert row["fit_images"] + row["held_out_images"] == 10
    assert row["test_images"] == 6
    assert [s["label"] for s in row["by_type"]] == ["spot"]
    assert row["config"]["layers"] == [1, 2]
    if method != "saae":  # even random features show a white square
        assert metrics["pixel_roc_auc"]["value"] > 0.9
        assert metrics["image_roc_auc"]["value"] == 1.0
    assert quality.is_same(row, cell(tree, method))
    assert not quality.is_same(row, quality.Cell(str(tree), "part", method, "fast", {**CHANGES, "seed": 1}, "random"))


def run(arguments: list[str]) -> tuple[int, str]:
    app = Typer()
    app.command()(quality.main)
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    return done.exit_code, done.output


def test_a_finished_cell_is_not_run_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quality.json"
    arguments = ["--data", str(tree), "--weights", "random", "--out", str(out), *WORDS]
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca"])
    assert code == 0, text
    first = json.loads(out.read_text())
    assert [r["method"] for r in first["rows"]] == ["pca"]
    assert first["machine"]["cores"] >= 1

    def refuse(cell: quality.Cell) -> dict[str, object]:
        raise SaaeError(f"ran {cell.method}")

    monkeypatch.setattr(quality, "run_fresh", refuse)
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca"])
    assert code == 0, text
    assert json.loads(out.read_text()) == first
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca", "--again"])
    assert code == 2
    code, text = run([*arguments, "--only-baselines", "--baseline", "pca,pca-raw"])
    assert (code, "ran pca-raw" in text) == (2, True)
    assert json.loads(out.read_text()) == first


def test_a_cell_that_fails_says_why(tree: Path) -> None:
    with pytest.raises(SaaeError, match="nothere"):
        quality.run_fresh(quality.Cell(str(tree), "nothere", "pca", "fast", dict(CHANGES), "random"))


def test_bad_options_are_named(tree: Path) -> None:
    with pytest.raises(ConfigError, match="latent"):
        quality.changes_of(["nonsense=1"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        quality.changes_of(["steps"])
    assert quality.changes_of(["steps=30", "layers=[3,4]", "score=l2"]) == {
        "steps": 30,
        "layers": (3, 4),
        "score": "l2",
    }
    code, text = run(["--data", str(tree), "--baseline", "magic"])
    assert code == 2
    assert "magic" in text


def test_the_paper_stands_beside_its_categories() -> None:
    def row(category: str, method: str, value: float | None) -> dict[str, object]:
        metric = {"value": value}
        names = ("pixel_roc_auc", "pro_auc", "image_roc_auc")
        return {
            "category": category,
            "method": method,
            "config": {"preset": "fast"},
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
    mean = np.mean([pixel for pixel, _ in quality.PAPER.values()]), np.mean([pro for _, pro in quality.PAPER.values()])
    assert mean == (pytest.approx(97.9, abs=0.06), pytest.approx(93.6, abs=0.06))  # as the tables' last rows say
