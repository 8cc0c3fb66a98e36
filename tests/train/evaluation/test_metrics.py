"""Metrics against scikit-learn and against a brute-force PRO, on small cases with many ties."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from saae_runtime.errors import DataError
from saae_train.evaluation import metrics
from saae_train.evaluation.bootstrap import ranked_intervals, score_intervals, share_interval
from saae_train.evaluation.metrics import Metric, PixelPool
from saae_train.evaluation.ranking import BestF1, Rates, best_f1_of

Pair = tuple[np.ndarray, np.ndarray]


def _pixel_best_f1(maps: Any, masks: Any) -> BestF1:
    return best_f1_of(PixelPool.of(maps, masks).ranking())


def _with_interval(scores: Any, labels: Any) -> Metric:
    interval = score_intervals(scores, labels)
    assert interval is not None
    return metrics.roc_auc(scores, labels).with_interval(*interval)


def _pixel_rates(maps: Any, masks: Any, threshold: float) -> Rates:
    return PixelPool.of(maps, masks).rates(threshold)


@st.composite
def cases(draw: st.DrawFn) -> list[Pair]:
    """1..4 images of different sizes; few distinct values, so ties are everywhere."""
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        levels = draw(hnp.arrays(np.int8, shape, elements=st.integers(-3, 4)))
        mask = draw(hnp.arrays(bool, shape))
        pairs.append(((levels / 4).astype(np.float32), mask))
    return pairs


def flat(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([a.ravel() for a, _ in pairs]), np.concatenate([m.ravel() for _, m in pairs])


def flood_regions(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected components by flood fill over all eight neighbours."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, front = set(), [left.pop()]
        while front:
            y, x = front.pop()
            region.add((y, x))
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    front.append(near)
        regions.append(region)
    return regions


def brute_pro(pairs: Sequence[Pair], limit: float) -> float:
    """Threshold every image at every value, overlap region by region, integrate point by point."""
    values, labels = flat(pairs)
    points = [(0.0, 0.0)]
    for t in sorted(set(values.tolist()), reverse=True):
        overlaps = [sum(a[y, x] >= t for y, x in region) / len(region) for a, m in pairs for region in flood_regions(m)]
        points.append((float((values[~labels] >= t).mean()), sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([0.05, 0.3, 1.0]))
def test_pixel_metrics_equal_the_references(pairs: list[Pair], limit: float) -> None:
    maps, masks = [a for a, _ in pairs], [m for _, m in pairs]
    values, labels = flat(pairs)
    found = metrics.pixel_metrics(maps, masks, limit=limit)
    if labels.all() or not labels.any():
        assert found["pixel_roc_auc"].value is None
        assert found["pixel_roc_auc"].reason
        assert found["pro_auc"].value is None
        return
    assert float(found["pixel_roc_auc"]) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert float(found["pixel_average_precision"]) == pytest.approx(average_precision_score(labels, values), abs=1e-12)
    assert float(found["pro_auc"]) == pytest.approx(brute_pro(pairs, limit), abs=1e-12)
    assert all(m.error == 0.0 for m in found.values())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_best_f1_is_the_best_and_its_threshold_reaches_it(pairs: list[Pair]) -> None:
    values, labels = flat(pairs)
    f1, threshold = _pixel_best_f1([a for a, _ in pairs], [m for _, m in pairs])
    if not labels.any():
        assert threshold is None
        assert f1.value is None
        return
    assert threshold is not None
    assert f1_score(labels, values > np.float32(threshold)) == pytest.approx(float(f1))
    best = max(f1_score(labels, values >= t) for t in np.unique(values))
    assert float(f1) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(-1, 1.25, width=32))
def test_rates_count_what_lies_strictly_above(pairs: list[Pair], threshold: float) -> None:
    values, labels = flat(pairs)
    found = _pixel_rates([a for a, _ in pairs], [m for _, m in pairs], threshold)
    for metric, chosen in ((found.fpr, ~labels), (found.tpr, labels)):
        if chosen.any():
            assert metric.value == pytest.approx(float((values[chosen] > threshold).mean()))
        else:
            assert metric.value is None
    flat_rates = metrics.rates(values, labels, threshold)
    assert (flat_rates.fpr.value, flat_rates.tpr.value) == (found.fpr.value, found.tpr.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_image_metrics_equal_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores, labels = [s / 3 for s, _ in rows], [y for _, y in rows]
    assert float(metrics.roc_auc(scores, labels)) == pytest.approx(roc_auc_score(labels, scores))
    assert float(metrics.average_precision(scores, labels)) == pytest.approx(average_precision_score(labels, scores))


def test_values_one_float32_step_apart_are_told_apart() -> None:
    base = np.float32(1000.0)
    up = np.nextafter(base, np.float32(2000))
    maps = [np.array([[base, base, up, up]], np.float32)]
    masks = [np.array([[0, 0, 1, 1]], bool)]
    assert float(metrics.pixel_roc_auc(maps, masks)) == 1.0
    assert _pixel_best_f1(maps, masks).f1.value == 1.0
    maps[0][:] = base
    assert float(metrics.pixel_roc_auc(maps, masks)) == 0.5


def test_float64_maps_keep_their_precision() -> None:
    maps = [np.array([[1.0, 1.0 + 1e-12]])]
    assert float(metrics.pixel_roc_auc(maps, [np.array([[0, 1]])])) == 1.0


def test_small_and_large_regions_weigh_the_same_in_pro() -> None:
    mask = np.zeros((20, 20), bool)
    mask[:10] = True  # 200 pixels, found entirely
    mask[15, 15] = True  # 1 pixel, missed
    anomaly_map = mask.astype(np.float32)
    anomaly_map[15, 15] = -1.0
    assert float(metrics.pro_auc([anomaly_map], [mask])) == pytest.approx(0.5)
    assert float(metrics.pixel_roc_auc([anomaly_map], [mask])) > 0.99


def test_diagonal_neighbours_are_one_region() -> None:
    mask = np.eye(3, dtype=bool)
    assert PixelPool.of([np.zeros((3, 3), np.float32)], [mask]).ranking().regions == 1


# ---- what has no number has a reason --------------------------------------------------------------


def test_all_normal_test_set() -> None:
    found = metrics.pixel_metrics([np.zeros((2, 2), np.float32)], [None], intervals=True)
    assert {m.reason for m in found.values()} == {"no defective pixel in the test set"}
    assert metrics.roc_auc([0.1], [0]).reason == "no defective image in the test set"
    assert metrics.best_f1([0.1], [0]) == (Metric(None, "no defective image in the test set"), None)


def test_mask_that_covers_everything() -> None:
    found = metrics.pixel_metrics([np.ones((2, 2), np.float32)], [np.ones((2, 2))], intervals=True)
    assert found["pixel_roc_auc"].reason == "no defect-free pixel in the test set"
    assert found["pro_auc"].value is None
    assert found["pixel_average_precision"].value == 1.0


def test_nothing_at_all() -> None:
    assert metrics.pixel_roc_auc([], []).reason == "there is no pixel to evaluate"
    assert metrics.roc_auc([], []).reason == "there is no image to evaluate"
    assert _pixel_rates([], [], 0.5).fpr.value is None


def test_a_metric_without_a_value_says_why_when_used_as_a_number() -> None:
    with pytest.raises(DataError, match="no defective image"):
        float(metrics.roc_auc([0.1], [0]))
    with pytest.raises(ValueError, match="reason"):
        Metric(None)
    with pytest.raises(ValueError, match="finite"):
        Metric(float("nan"))


def test_metric_as_text_and_json() -> None:
    assert str(Metric(0.98765)) == "98.77" or str(Metric(0.98765)) == "98.76"
    assert str(Metric(0.5).with_interval(0.25, 0.75)) == "50.00 [25.00, 75.00]"
    assert str(Metric(None, "no mask")) == "- (no mask)"
    assert json.loads(json.dumps(Metric(None, "no mask").to_json())) == {"value": None, "reason": "no mask"}
    assert Metric(0.5, error=0.1).with_interval(0, 1).to_json() == {
        "value": 0.5,
        "error": 0.1,
        "interval": [0.0, 1.0],
    }


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_map_is_refused_by_name(bad: float) -> None:
    anomaly_map = np.zeros((3, 3), np.float32)
    anomaly_map[1, 1] = bad
    pool = PixelPool()
    with pytest.raises(DataError, match=r"bad\.png.*1 of 9 values"):
        pool.add(anomaly_map, None, name="bad.png")
    with pytest.raises(DataError, match="scores"):
        metrics.roc_auc([0.0, bad], [0, 1])


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"map 1.*\(2, 2\).*\(3, 3\)"):
        metrics.pixel_roc_auc([np.zeros((2, 2))], [np.zeros((3, 3))])
    with pytest.raises(DataError, match="H x W"):
        metrics.pixel_roc_auc([np.zeros((2, 2, 1))], [None])
    with pytest.raises(DataError, match="mask 2 is missing"):
        metrics.pixel_roc_auc([np.zeros((2, 2))] * 2, [None])
    with pytest.raises(DataError, match="only 1 maps"):
        metrics.pixel_roc_auc([np.zeros((2, 2))], [None, None])
    with pytest.raises(DataError, match="2 scores but 3 labels"):
        metrics.roc_auc([0.1, 0.2], [0, 1, 1])
    with pytest.raises(ValueError, match="limit"):
        metrics.pro_auc([np.zeros((1, 2))], [np.array([[0, 1]])], limit=0.0)


# ---- groups, bins, intervals ----------------------------------------------------------------------


def noisy(count: int, size: int = 24, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Maps of noise with brighter defects: a third good, the rest of two kinds of different contrast."""
    rng = np.random.default_rng(seed)
    maps, masks, groups = [], [], []
    for i in range(count):
        group = ("good", "scratch", "hole")[i % 3]
        mask = np.zeros((size, size + i % 4), bool)
        if group != "good":
            y, x = rng.integers(0, size - 8, 2)
            mask[y : y + 5, x : x + 3 + i % 4] = True
        contrast = {"good": 0.0, "scratch": 1.0, "hole": 2.5}[group]
        maps.append((rng.standard_normal(mask.shape) + contrast * mask).astype(np.float32))
        masks.append(mask)
        groups.append(group)
    return maps, masks, groups


def test_groups_are_ranked_as_if_alone() -> None:
    maps, masks, groups = noisy(9)
    pool = PixelPool.of(maps, masks, groups)
    for chosen in ({"scratch", "good"}, {"hole"}, {"good", "scratch", "hole"}):
        rows = [i for i, g in enumerate(groups) if g in chosen]
        alone = metrics.pixel_metrics([maps[i] for i in rows], [masks[i] for i in rows])
        assert metrics.pool_metrics(pool, chosen) == alone
    assert metrics.pool_metrics(pool) == metrics.pixel_metrics(maps, masks)
    # An image added later counts.
    pool.add(maps[1] + 5, masks[1], "scratch")
    assert metrics.pool_metrics(pool) != metrics.pixel_metrics(maps, masks)


@pytest.mark.parametrize("quantise", [False, True])
def test_binned_metrics_stay_within_their_stated_error(quantise: bool) -> None:
    maps, masks, groups = noisy(12, seed=1)
    # Squeezed into a narrow range, many values share a bin.
    maps = [(1000 + a * 0.1 if quantise else a).astype(np.float32) for a in maps]
    exact = PixelPool.of(maps, masks, groups)
    binned = PixelPool.of(maps, masks, groups, exact_pixels=3000)
    assert exact.exact
    assert not binned.exact
    assert binned.images == exact.images == 12
    for chosen in (None, {"good", "hole"}):
        a, b = metrics.pool_metrics(exact, chosen), metrics.pool_metrics(binned, chosen)
        for name, metric in b.items():
            assert abs(float(metric) - float(a[name])) <= metric.error + 1e-12, name
            assert metric.error < 0.15
            assert (metric.error > 1e-4) == quantise or name == "pixel_best_f1"
        t = float(np.quantile(maps[2], 0.97))
        for x, y in zip(exact.rates(t, chosen), binned.rates(t, chosen), strict=True):
            assert abs(float(x) - float(y)) <= y.error + 1e-12


def test_binned_values_keep_order_across_zero() -> None:
    anomaly_map = np.array([[-2.0, -0.0, 0.0, 1e-30, 3.0]], np.float32)
    mask = np.array([[0, 0, 1, 1, 1]])
    pool = PixelPool.of([anomaly_map], [mask], exact_pixels=0)
    assert not pool.exact
    assert float(metrics.pool_metrics(pool)["pixel_roc_auc"]) == pytest.approx(1 - 0.5 / 6)


def test_intervals_cover_the_value_and_agree_with_naive_resampling() -> None:
    maps, masks, groups = noisy(18, seed=2)
    pool = PixelPool.of(maps, masks, groups)
    found = metrics.pool_metrics(pool, intervals=True)
    rng = np.random.default_rng(5)
    bad = [i for i, g in enumerate(groups) if g != "good"]
    good = [i for i, g in enumerate(groups) if g == "good"]
    naive: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(150):
        rows = [*rng.choice(bad, len(bad)), *rng.choice(good, len(good))]
        for name, metric in metrics.pixel_metrics([maps[i] for i in rows], [masks[i] for i in rows]).items():
            naive[name].append(float(metric))
    for name, metric in found.items():
        assert metric.low is not None
        assert metric.high is not None
        assert metric.low < float(metric) < metric.high, name
        low, high = np.quantile(naive[name], [0.025, 0.975])
        width = high - low
        assert metric.low == pytest.approx(low, abs=0.35 * width), name
        assert metric.high == pytest.approx(high, abs=0.35 * width), name


def test_image_interval_brackets_the_value() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    metric = _with_interval(rng.standard_normal(40) + labels, labels)
    assert metric.low is not None
    assert metric.high is not None
    assert 0.5 < metric.low < float(metric) < metric.high <= 1.0
    assert score_intervals(labels, labels) is None  # all replicates agree, which says nothing of other images
    assert score_intervals([0, 1], [0, 1]) is None


def test_shares_are_resampled_by_image_within_their_strata() -> None:
    rng = np.random.default_rng(4)
    totals = rng.integers(50, 100, 40)
    hits = rng.binomial(totals, 0.3)
    strata = np.arange(40) < 10
    bounds = share_interval(hits, totals, strata)
    assert bounds is not None
    draws = [
        np.concatenate([rng.choice(np.flatnonzero(strata == s), (strata == s).sum()) for s in (False, True)])
        for _ in range(1000)
    ]
    naive = np.quantile([hits[d].sum() / totals[d].sum() for d in draws], [0.025, 0.975])
    assert bounds == pytest.approx(tuple(naive), abs=0.01)
    # All images agree, which says nothing of others.
    assert share_interval([0, 0, 5], [10, 10, 0], [False, False, True]) is None
    assert share_interval([2, 3, 0], [14, 21, 0], [False, False, True]) is None
    assert share_interval([1], [2], [True]) is None


def test_intervals_of_ranked_images_agree_with_naive_resampling() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 30)
    scores = (rng.standard_normal(30) + labels).round(1)  # with ties
    found = ranked_intervals(scores, labels)
    good, bad = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    replicates = []
    for _ in range(1000):
        d = np.concatenate([rng.choice(good, good.size), rng.choice(bad, bad.size)])
        f1 = metrics.best_f1(scores[d], labels[d]).f1
        replicates.append((float(metrics.average_precision(scores[d], labels[d])), float(f1)))
    naive = np.quantile(replicates, [0.025, 0.975], axis=0)
    for k in range(2):
        assert found[k] == pytest.approx(tuple(naive[:, k]), abs=0.04)
    assert ranked_intervals([1, 2, 3], [0, 1, 1]) == (None, None)
