"""Curve points and the qualitative sheet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import DataError
from saae_train.charts.sheet import SheetColumn, qualitative_sheet
from saae_train.evaluation.curves import curves, decimate
from saae_train.evaluation.metrics import PixelPool
from saae_train.evaluation.ranking import Ranking


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 400), st.integers(2, 60), st.integers(0, 10**6), st.booleans())
def test_no_dropped_point_is_farther_than_stated(n: int, points: int, seed: int, monotone: bool) -> None:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.choice(rng.random(5), n) if seed % 2 else rng.random(n))
    y = rng.random(n)
    if monotone:
        y = np.sort(y)
    kx, ky = decimate(x, y, points)
    assert kx.size <= max(points, 2)
    assert (kx[0], ky[0], kx[-1], ky[-1]) == (x[0], y[0], x[-1], y[-1])
    length = np.abs(np.diff(x)).sum() + np.abs(np.diff(y)).sum()
    nearest = (np.abs(x[:, None] - kx) + np.abs(y[:, None] - ky)).min(axis=1)
    assert nearest.max() <= length / (points - 1) + 1e-9


def test_decimate_needs_two_points() -> None:
    with pytest.raises(ValueError, match="two"):
        decimate([0, 1], [0, 1], 1)


def ranked() -> Ranking:
    rng = np.random.default_rng(0)
    mask = np.zeros((120, 120), bool)
    mask[10:40, 10:40] = mask[80:85, 80:85] = True
    anomaly_map = (rng.standard_normal(mask.shape) + 2 * mask).astype(np.float32)
    return PixelPool.of([anomaly_map], [mask]).ranking()


def test_drawn_curves_have_the_area_of_the_exact_ones() -> None:
    ranking = ranked()
    roc, pro, pr = curves(ranking, points=300)
    assert roc.x.size <= 300
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(float(roc.area), abs=2e-3)
    grid = np.linspace(0, 0.3, 3001)
    assert np.interp(grid, pro.x, pro.y).mean() == pytest.approx(float(pro.area), abs=3e-3)
    assert pro.limit == 0.3
    assert np.trapezoid(pr.y, pr.x) == pytest.approx(float(pr.area), abs=1e-2)
    assert [c.title for c in (roc, pro, pr)] == ["pixel ROC", "per-region overlap", "pixel precision-recall"]


def test_one_class_has_no_curve_and_images_have_no_regions() -> None:
    assert curves(Ranking.from_scores([0.1, 0.2], [0, 0])) == []
    assert [c.title for c in curves(Ranking.from_scores([0.1, 0.2], [0, 1]))] == [
        "image ROC",
        "image precision-recall",
    ]


def test_sheet_shows_the_segmentation_at_t() -> None:
    frame = np.full((40, 80, 3), 120, np.uint8)
    truth = np.zeros((40, 80), bool)
    truth[10:30, 20:40] = True
    anomaly_map = np.where(truth, 2.0, 0.5).astype(np.float32)
    tall = SheetColumn("good", np.full((80, 40, 3), 50, np.uint8), None, np.zeros((80, 40), np.float32))
    page = qualitative_sheet([SheetColumn("hole", frame, truth, anomaly_map), tall], 1.0, cell=80)
    assert page.dtype == np.uint8
    left, top, step = 104, 26, 86
    cells = [page[top + j * step : top + j * step + 80, left : left + 80] for j in range(4)]
    assert (cells[0][40, 40] == 120).all()
    # Input 80 wide: scale 1, centred in the square, 20 rows from the top.
    expected = np.repeat(truth[:, :, None], 3, axis=2) * 255
    np.testing.assert_array_equal(cells[1][20:60], expected)
    np.testing.assert_array_equal(cells[3][20:60], expected)
    unknown = page[top + step : top + step + 80, left + step : left + step + 80]
    assert (unknown[:, 20:60] == 128).all()  # not black: that would be "no defect"
    assert (cells[2][20 + 20, 30] != cells[2][20 + 2, 2]).any()
    empty = page[top + 3 * step : top + 3 * step + 80, left + step + 20 : left + step + 60]
    assert (empty == 0).all()
    assert (qualitative_sheet([tall], 1.0, cell=80) != 255).any()


def test_sheet_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no image"):
        qualitative_sheet([], 1.0)


def test_the_dot_is_the_best_f1_of_all_thresholds() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(0, 1, 60).round(1), rng.integers(0, 2, 60)  # rounded: with ties
    curve = curves(Ranking.from_scores(scores + labels, labels))[-1]
    assert curve.title == "image precision-recall"
    assert not curve.chance
    best = (0.0, 0.0, 0.0)
    for threshold in np.unique(scores + labels):
        hit = scores + labels >= threshold
        recall, precision = hit[labels == 1].mean(), labels[hit].mean()
        if recall:
            best = max(best, (2 * precision * recall / (precision + recall), recall, precision))
    assert curve.dot is not None
    assert curve.dot[:2] == pytest.approx(best[1:])
    assert curve.dot[2].startswith(f"best F1 {100 * best[0]:.2f} % at T ")
    assert curve.to_json()["dot"] == list(curve.dot)
