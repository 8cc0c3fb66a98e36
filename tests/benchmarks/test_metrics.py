"""The ways that benchmarks/metrics.py compares compute the same number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import metrics as bench
from saae_train.evaluation.metrics import pro_auc


def test_the_compared_ways_agree() -> None:
    maps, masks = bench.draw(6, 60)
    maps[0] = np.round(maps[0], 1)  # ties
    ours = float(pro_auc(maps, masks, bench.LIMIT))
    assert bench.pro_one_sort(maps, masks) == pytest.approx(ours, abs=1e-9)
    assert bench.pro_thresholds(maps, masks, 800) == pytest.approx(ours, abs=0.01)


def test_command_writes_its_result(tmp_path: Path) -> None:
    app = Typer()
    app.command()(bench.main)
    out = tmp_path / "metrics.json"
    done = CliRunner().invoke(
        app, ["--images", "4", "--size", "40", "--thresholds", "20", "--runs", "1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert [r["way"] for r in data["rows"]] == ["saae", "one sort", "thresholds"]
    assert data["rows"][0]["pro_auc"] == pytest.approx(data["rows"][1]["pro_auc"], abs=1e-9)
