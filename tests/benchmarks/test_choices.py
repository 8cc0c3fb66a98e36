"""benchmarks/choices.py: both sides of a choice, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_builds import CONFIG, draw

import saae_export.pipeline.select as select
from benchmarks.choices import HEADINGS, measure, table_rows


def test_each_configuration_has_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"as given": lambda config: config, "joint": lambda config: config.with_values({"score": "joint"})}
    monkeypatch.setattr(select, "CHOICES", few)
    rows = measure(draw(tmp_path / "data"), "weave", CONFIG, "auto", "random", 5, tmp_path / "cache", tmp_path / "work")
    assert [row["configuration"] for row in rows] == ["as given", "joint"]
    assert sum(row["taken"] for row in rows) == 1
    assert rows[0]["ahead"] == 0.0
    for row in rows:
        assert 0 <= row["simulated_image_roc_auc"] <= 1
        assert 0 <= row["image_roc_auc"] <= 1
        assert {row["found"], row["rejected"]} <= {index / 10 for index in range(11)} | {1 / 3, 2 / 3}
    assert rows[0]["image_roc_auc"] != rows[1]["image_roc_auc"] or rows[0]["pro_auc"] != rows[1]["pro_auc"]
    table = table_rows(rows)
    assert [len(line) for line in table] == [len(HEADINGS)] * 2
    assert sum("(taken)" in str(line[1]) for line in table) == 1
