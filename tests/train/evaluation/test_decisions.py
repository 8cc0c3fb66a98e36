"""Verdicts against counting by hand, and the best threshold against trying all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saae_runtime.thresholds import ThresholdTable
from saae_train.evaluation.decisions import best_youden, decide, decisions

numbers = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=20)


@given(numbers, numbers)
def test_the_best_of_all_thresholds(good: list[float], defective: list[float]) -> None:
    found = best_youden(np.array(good), np.array(defective))
    tried = [
        np.mean(np.array(defective) > limit) - np.mean(np.array(good) > limit) for limit in np.arange(-0.5, 10, 0.5)
    ]
    assert found == pytest.approx(max(tried))


def test_counts() -> None:
    found = decide([1, 2, 3, 4, 5], [False, False, True, False, True], 3.0)
    assert (found.good, found.false_alarms, found.defective, found.found) == (3, 1, 2, 1)
    assert found.fpr == pytest.approx(1 / 3)
    assert found.tpr == 0.5
    assert found.best == pytest.approx(2 / 3)
    assert found.regret == pytest.approx(2 / 3 - (1 / 2 - 1 / 3))
    assert found.fpr < found.fpr_limit < 1.0
    assert found.to_json()["false_alarms"] == 1


def test_good_images_alone() -> None:
    found = decide([1, 2], [False, False], 1.5)
    assert (found.fpr, found.tpr, found.best) == (0.5, 0.0, 0.0)


def test_at_the_default_and_at_nominal_rates() -> None:
    table = ThresholdTable.estimated([1.0, 1.1, 1.2, 0.9, 1.05, 0.95, 1.15, 1.0, 1.1], 0.2)
    found = decisions([1.0, 2.0], [False, True], table)
    assert [item.rate for item in found] == [None, 0.01, 0.05]
    assert found[0].threshold == table.at(0.2) < found[2].threshold < found[1].threshold
