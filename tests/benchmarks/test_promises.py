"""benchmarks/promises.py: what was promised and what was found, on a tiny model and on made-up counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_builds import CONFIG, draw

from benchmarks.promises import HEADINGS, RATES, measure, table_rows
from saae_runtime.errors import ConfigError
from saae_runtime.estimate import highest_rate
from saae_runtime.result import Scored

pytestmark = pytest.mark.needs("timm")


def test_a_draw_is_judged_on_the_images_that_it_left(tmp_path: Path) -> None:
    row = measure(draw(tmp_path / "data"), "weave", CONFIG, 6, 3, "random", tmp_path / "cache")
    assert (row["images"], row["unseen"], row["seed"]) == (6, 3, CONFIG.seed)
    assert [found["rate"] for found in row["rates"]] == list(RATES)
    for found in row["rates"]:
        assert found["stated"] == highest_rate(found["above"], 6)
        assert 0 <= found["alarms"] <= 3
    assert row["rates"][0]["alarms"] <= row["rates"][1]["alarms"], "a lower rate rejects no more"


@pytest.mark.parametrize(("score", "alarms"), [(0.0, 0), (1e9, 3)])
def test_scores_above_the_threshold_are_alarms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float, alarms: int
) -> None:
    from saae_train.model.scorer import TorchScorer

    monkeypatch.setattr(
        TorchScorer, "__call__", lambda self, frame: Scored(score, np.zeros(frame.shape[:2], np.float32))
    )
    row = measure(draw(tmp_path / "data"), "weave", CONFIG, 6, 3, "random", tmp_path / "cache")
    assert [found["alarms"] for found in row["rates"]] == [alarms, alarms]


def test_a_draw_leaves_images_and_needs_a_memory(tmp_path: Path) -> None:
    data = draw(tmp_path / "data")
    with pytest.raises(ConfigError, match="leave none unseen"):
        measure(data, "weave", CONFIG, 10, 3, "random", tmp_path / "cache")
    without = CONFIG.with_values({"score": "joint", "memory": None})
    with pytest.raises(ConfigError, match="has no memory"):
        measure(data, "weave", without, 6, 3, "random", tmp_path / "cache")


def test_draws_are_counted_together() -> None:
    def row(seed: int, alarms: int, preset: str = "fast") -> dict[str, object]:
        rates = [{"rate": rate, "above": 1, "stated": 0.1 + 0.01 * seed, "alarms": alarms} for rate in RATES]
        return {"category": "part", "images": 30, "seed": seed, "preset": preset, "unseen": 100, "rates": rates}

    table = table_rows([row(0, 4), row(1, 6)])
    assert [line[0] for line in table_rows([row(0, 4), row(0, 60, "bank")])] == ["part"] * 2 + ["part, bank"] * 2
    assert [line[4] for line in table] == ["1", "5"]
    for line in table:
        assert len(line) == len(HEADINGS)
        assert line[:4] == ["part", 30, 2, 200]
        assert line[5:] == ["11.0", "5.0", "2.4 to 9.0"]  # Clopper and Pearson, 10 of 200
