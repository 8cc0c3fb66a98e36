"""The image threshold as an estimate, against scipy and against simulated good images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need

from saae_runtime.errors import CalibrationError
from saae_runtime.estimate import ScoreModel, _t_quantile, chance_of_alarms, highest_rate

RATES = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("count", [14, 46, 300])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_promised_rate_holds_for_further_images(count: int, rate: float) -> None:
    generator = np.random.default_rng(count)
    found = []
    for _ in range(400):
        scores = np.exp(generator.normal(1.5, 0.08, count))
        threshold = ScoreModel.fit(scores).threshold(rate)
        found.append((np.exp(generator.normal(1.5, 0.08, 500)) > threshold).mean())
    assert 0.5 * rate < np.mean(found) < 1.3 * rate


@pytest.mark.parametrize("count", [8, 14, 46, 200])
def test_one_image_that_is_not_good_decides_nothing(count: int) -> None:
    """The largest value, the rule before, would follow it wherever it goes."""
    generator = np.random.default_rng(count)
    scores = np.exp(generator.normal(1.5, 0.08, count))
    clean, spoilt = scores.copy(), scores.copy()
    spoilt[np.argmax(scores)] = scores.max() * 5
    assert ScoreModel.fit(spoilt).threshold(0.05) == pytest.approx(ScoreModel.fit(clean).threshold(0.05), rel=1e-9)


def test_a_heavier_tail_than_the_line_is_seen() -> None:
    generator = np.random.default_rng(5)
    scores = np.concatenate([generator.normal(1.0, 0.02, 80), generator.normal(2.0, 0.1, 20)])
    model = ScoreModel.fit(np.exp(scores))
    assert (np.exp(scores) > model.threshold(0.05)).sum() <= 10


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_rarer_alarms_never_lower_the_threshold(scores: list[float]) -> None:
    model = ScoreModel.fit(scores)
    found = [model.threshold(rate) for rate in RATES]
    assert all(np.isfinite(found))
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(found))
    assert found[0] >= max(scores)
    assert model.rate(model.threshold(0.05)) <= 0.05 + 1e-6


def test_leverage_names_the_images_that_move_the_threshold() -> None:
    generator = np.random.default_rng(1)
    scores = np.sort(np.exp(generator.normal(1.5, 0.05, 6)))  # too few to leave one out of the line
    scores[-1] *= 2
    lever = ScoreModel.fit(scores).leverage(0.05)
    assert int(lever.argmax()) == 5
    assert lever[5] > 0.3
    assert ScoreModel.fit(scores[:1]).leverage(0.05).tolist() == [0.0]


@pytest.mark.parametrize(("freedom", "worst"), [(1, 1e-12), (2, 1e-12), (3, 0.02), (6, 1e-3), (30, 1e-6)])
def test_student_against_scipy(freedom: int, worst: float) -> None:
    stats = need("scipy.stats")
    for share in (0.5, 0.8, 0.95, 0.99):
        assert _t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=worst, abs=1e-9)


@pytest.mark.parametrize(("above", "count"), [(0, 5), (0, 100), (3, 40), (40, 40)])
def test_highest_rate_against_scipy(above: int, count: int) -> None:
    stats = need("scipy.stats")
    expected = 1.0 if above == count else stats.beta.ppf(0.95, above + 1, count - above)
    assert highest_rate(above, count) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [-1.0], [float("inf")]])
def test_scores_that_are_none(scores: list[float]) -> None:
    with pytest.raises(CalibrationError):
        ScoreModel.fit(scores)


@pytest.mark.parametrize(("above", "count"), [(0, 1), (0, 30), (2, 50), (9, 10)])
def test_chance_of_alarms_against_scipy(above: int, count: int) -> None:
    stats = need("scipy.stats")
    for good, alarms in ((1, 0), (1, 1), (14, 1), (41, 3), (190, 190), (190, 12)):
        exact = stats.betabinom.sf(alarms - 1, good, above + 1, count - above)
        assert chance_of_alarms(alarms, good, above, count) == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_good_images_like_those_of_the_calibration_are_seldom_surprising() -> None:
    """Among 1000 pairs of sets from one distribution, at most one in a hundred has so many alarms; with margin."""
    rng = np.random.default_rng(0)
    for count, good, above in ((30, 28, 0), (40, 60, 0), (50, 100, 2)):
        surprised = 0
        for _ in range(1000):
            limit = np.sort(rng.normal(size=count))[-1 - above]
            alarms = int((rng.normal(size=good) > limit).sum())
            surprised += chance_of_alarms(alarms, good, above, count) < 0.01
        assert surprised <= 20
