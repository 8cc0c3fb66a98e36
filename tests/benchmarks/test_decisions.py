"""benchmarks/decisions.py on rows of a result file, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import decisions

pytestmark = pytest.mark.needs("timm")


def row(seed: int, method: str = "saae", score: str = "memory", fpr: float = 0.1) -> dict[str, object]:
    verdict = {"good": 20, "defective": 40, "fpr": fpr, "tpr": 0.8, "regret": 0.05}
    config = {"preset": "fast", "score": score, "seed": seed}
    return {"category": "part", "method": method, "config": config, "decisions": [verdict] * 3}


def test_seeds_become_one_row_and_scores_have_names() -> None:
    old = {key: value for key, value in row(0).items() if key != "decisions"}
    table = decisions.table_rows([row(0, fpr=0.1), row(1, fpr=0.2), row(0, score="joint"), row(0, "padim"), old])
    assert [line[1] for line in table] == ["saae, fast", "saae, fast, score joint", "padim"]
    assert table[0][2:6] == ["20 / 40", "15.0", "80.0", "0.050"]


def test_other_images_and_weights_are_no_seeds_of_one_experiment() -> None:
    rows = [row(0), {**row(1), "images": "b"}, {**row(2), "weights": "hub"}]
    assert len(decisions.table_rows(rows)) == 3


def run(*words: str) -> tuple[int, str]:
    app = Typer()
    app.command()(decisions.main)
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "160"})
    return done.exit_code, done.output


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(json.dumps({"rows": [row(0)]}))
    code, text = run(str(tmp_path / "quality.json"))
    assert code == 0
    assert "saae, fast" in text
    code, text = run(str(tmp_path / "none.json"))
    assert code == 2
    assert "quality.py" in text
