"""The choice among models: the first unless another is ahead beyond chance, defect by defect."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saae_runtime.errors import ConfigError
from saae_train.evaluation.ranking import Metric
from saae_train.evaluation.share import Share
from saae_train.selftest.choose import Tried, choose
from saae_train.selftest.result import Defect, SelfTest

NORMAL = tuple(float(value) for value in range(20))


def self_test(scores: list[float], kinds: list[str] | None = None) -> SelfTest:
    limit = 18.5
    defects = tuple(
        Defect(
            "a.png", kind, "large", "strong", 9.0, 50, 20.0, score, score, score > limit, False, (0, 0, kind, "", "", i)
        )
        for i, (score, kind) in enumerate(zip(scores, kinds or ["spot"] * len(scores), strict=True))
    )
    metric = Metric(0.5)
    return SelfTest(defects, Share(0, 4), limit, limit, metric, metric, {}, 3, 0)


def tried(name: str, scores: list[float], kinds: list[str] | None = None) -> Tried:
    return Tried(name, self_test(scores, kinds), NORMAL)


def test_the_better_model_is_taken() -> None:
    choice = choose([tried("first", [3.0, 4.0, 5.0, 6.0] * 5), tried("second", [15.0, 16.0, 15.0, 18.7] * 5)])
    assert choice.name == "second"
    assert choice.separation["second"] > choice.separation["first"]
    assert choice.ahead["first"] == 0.0
    assert choice.found == {"first": 0.0, "second": pytest.approx(0.25)}


def test_the_first_stays_where_the_difference_may_be_chance() -> None:
    choice = choose([tried("first", [3.0, 9.0, 5.0, 6.0]), tried("second", [15.0, 2.0, 5.0, 7.0])])
    assert choice.separation["second"] > choice.separation["first"]
    assert choice.name == "first"
    assert 0 < choice.ahead["second"] < 2


def test_the_largest_of_those_that_are_ahead_is_taken() -> None:
    models = [tried("first", [3.0, 4.0] * 9), tried("second", [8.0, 9.0] * 9), tried("third", [12.0, 13.0] * 9)]
    assert choose(models).name == "third"
    assert choose([models[2], *models[:2]]).name == "third"


def test_kinds_count_alike_however_many_were_drawn() -> None:
    kinds = ["spot"] * 9 + ["blur"]
    choice = choose([tried("first", [30.0] * 9 + [-1.0], kinds)])
    assert choice.separation["first"] == pytest.approx(0.5)


def test_a_score_equal_to_a_good_images_counts_half() -> None:
    assert choose([tried("first", [0.0])]).separation["first"] == pytest.approx(0.5 / len(NORMAL))


@given(st.lists(st.integers(-5, 25), min_size=2, max_size=12), st.integers(1, 9), st.integers(-3, 3))
def test_only_the_order_of_scores_counts(scores: list[int], factor: int, shift: int) -> None:
    """Models have units of their own."""
    normal = tuple(factor * value + shift for value in NORMAL)
    other = Tried("second", self_test([float(factor * score + shift) for score in scores]), normal)
    found = choose([tried("first", [float(score) for score in scores]), other])
    assert found.name == "first"
    assert found.separation["second"] == found.separation["first"]
    assert found.ahead["second"] == 0.0


def test_different_defects_are_no_comparison() -> None:
    other = self_test([1.0, 2.0])
    moved = dataclasses.replace(other.defects[0], recipe=(5, 0, "spot", "", "", 9))
    with pytest.raises(ConfigError, match="different defects"):
        choose(
            [tried("a", [1.0, 2.0]), Tried("b", dataclasses.replace(other, defects=(moved, other.defects[1])), NORMAL)]
        )
    with pytest.raises(ConfigError, match="no model"):
        choose([])
