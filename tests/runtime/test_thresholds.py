"""Threshold tables: exact quantiles, bounded memory, and what a rate means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import CalibrationError, ConfigError
from saae_runtime.thresholds import DEFAULT_LEVELS, MARGIN, ThresholdAccumulator, ThresholdTable

numbers = st.floats(-1e6, 1e6, width=32)
samples = st.lists(numbers, min_size=1, max_size=300)
rates = st.floats(0.0, 1.0)


def raised(largest: float) -> float:
    """T for FPR 0: a hair above the largest sample."""
    return float(np.float64(largest) + MARGIN * abs(np.float64(largest)))


def share_above(values: list[float] | np.ndarray, threshold: float) -> float:
    return float(np.mean(np.asarray(values, np.float64) > threshold))


@settings(deadline=None)
@given(samples, rates)
def test_tabulated_rates_are_kept_and_tight(values: list[float], default: float) -> None:
    table = ThresholdTable.from_samples(values, default)
    ordered = np.sort(np.asarray(values, np.float64))
    for rate, threshold in zip(table.fpr, table.threshold, strict=True):
        assert share_above(values, threshold) <= rate + 1e-9
        if rate == 0.0:
            continue
        below = ordered[ordered < threshold]
        if below.size:  # the next lower sample would already break the promise
            assert share_above(values, below[-1]) > rate - 1e-9
    assert table.count == len(values)
    assert table.at(0.0) == raised(max(values))
    assert table.at() == table.at(default)


@settings(deadline=None)
@given(samples, st.lists(rates, min_size=2, max_size=20))
def test_threshold_never_rises_with_the_rate(values: list[float], asked: list[float]) -> None:
    table = ThresholdTable.from_samples(values, 0.001)
    thresholds = [table.at(rate) for rate in sorted(asked)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert min(values) <= thresholds[-1] <= thresholds[0] <= raised(max(values))


@settings(deadline=None)
@given(samples)
def test_rates_below_one_sample_give_the_largest(values: list[float]) -> None:
    table = ThresholdTable.from_samples(values, 0.0)
    assert table.at(0.999 / len(values)) == raised(max(values))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=50))
def test_at_zero_another_backends_rounding_flags_nothing_that_was_seen(values: list[float]) -> None:
    table = ThresholdTable.from_samples(values, 0.0)
    rounded = [value + 5e-4 * abs(value) for value in values]
    assert not any(value > table.at() for value in rounded)
    # and it is no more than a hair: twice that is above it
    assert max(values) + 2e-3 * abs(max(values)) > table.at()


@settings(deadline=None)
@given(samples, rates, rates)
def test_no_rate_is_exceeded(values: list[float], default: float, asked: float) -> None:
    table = ThresholdTable.from_samples(values, default)
    assert share_above(values, table.at(asked)) <= asked + 1e-8


def test_between_entries_the_safer_one_counts() -> None:
    table = ThresholdTable((0.0, 0.1, 0.2), (9.0, 5.0, 3.0), 0.1, 1000)
    assert [table.at(rate) for rate in (0.0, 0.05, 0.1, 0.15, 0.2, 1.0)] == [9.0, 9.0, 5.0, 5.0, 3.0, 3.0]
    assert table.at(0.1 + 0.1) == table.at(3 * 0.1 - 0.1) == 3.0  # what sums of floats leave behind is no difference


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(numbers, max_size=60), min_size=1, max_size=8).filter(lambda parts: any(parts)),
    st.integers(1, 40),
    rates,
)
def test_bounded_memory_is_exact_at_the_top_and_safe_below(parts: list[list[float]], keep: int, default: float) -> None:
    everything = [value for part in parts for value in part]
    accumulator = ThresholdAccumulator(keep)
    for part in parts:
        accumulator.add(np.asarray(part, np.float32))
    bounded = accumulator.table(default)
    exact = ThresholdTable.from_samples(everything, default)
    assert bounded.fpr == exact.fpr
    assert bounded.count == exact.count
    for rate, threshold, true in zip(bounded.fpr, bounded.threshold, exact.threshold, strict=True):
        if math.floor(rate * len(everything) + 1e-9) < keep:
            assert threshold == true
        else:
            assert threshold >= true
            assert threshold <= true + abs(true) * 2**-11 + 1e-37
            assert share_above(everything, threshold) <= rate + 1e-9


def test_many_pixels_stay_within_memory() -> None:
    rng = np.random.default_rng(0)
    accumulator = ThresholdAccumulator(keep=10_000)
    maps = [rng.gamma(2.0, size=(300, 400)).astype(np.float32) for _ in range(8)]
    for anomaly_map in maps:
        accumulator.add(anomaly_map)
    table = accumulator.table(0.001)
    flat = np.sort(np.concatenate([m.reshape(-1) for m in maps]))[::-1]
    assert accumulator._top.size == 10_000
    assert table.at(0.0) == raised(flat[0])
    assert table.at(0.001) == flat[int(0.001 * flat.size)]
    level = 10**-0.3  # one that is far below what is kept exactly
    assert table.at(level) == pytest.approx(flat[int(level * flat.size)], rel=1e-3)


def test_iterable_of_maps_equals_one_array() -> None:
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(5, 20, 30)).astype(np.float32)
    assert ThresholdTable.from_samples(iter(maps), 0.01) == ThresholdTable.from_samples(maps, 0.01)
    assert ThresholdTable.from_samples(list(maps), 0.01) == ThresholdTable.from_samples(maps, 0.01)


def test_levels_span_seven_decades() -> None:
    assert DEFAULT_LEVELS[0] == 0.0
    assert DEFAULT_LEVELS[1] == pytest.approx(1e-7)
    assert DEFAULT_LEVELS[-1] == 1.0
    assert list(DEFAULT_LEVELS) == sorted(set(DEFAULT_LEVELS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        ThresholdTable.from_samples([1.0, bad], 0.1)


def test_no_samples() -> None:
    with pytest.raises(CalibrationError, match="at least one"):
        ThresholdTable.from_samples(np.empty(0, np.float32), 0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, "0.1", True])
def test_impossible_rates(rate: object) -> None:
    table = ThresholdTable((0.0, 1.0), (2.0, 1.0), 0.0, 10)
    with pytest.raises(ConfigError):
        table.at(rate)  # type: ignore[arg-type]
    if isinstance(rate, float):
        with pytest.raises(ConfigError):
            ThresholdTable.from_samples([1.0], rate)


@pytest.mark.parametrize(
    ("fpr", "threshold", "default", "count"),
    [
        ((), (), 0.0, 1),
        ((0.0,), (1.0, 2.0), 0.0, 1),
        ((0.1, 0.2), (2.0, 1.0), 0.1, 1),
        ((0.0, 0.2, 0.2), (3.0, 2.0, 1.0), 0.1, 1),
        ((0.0, 0.2), (1.0, 2.0), 0.1, 1),
        ((0.0, math.nan), (2.0, 1.0), 0.1, 1),
        ((0.0, 0.1), (math.inf, 1.0), 0.1, 1),
        ((0.0, 1.1), (2.0, 1.0), 0.1, 1),
        ((0.0,), (1.0,), 2.0, 1),
        ((0.0,), (1.0,), 0.0, 0),
    ],
)
def test_invalid_tables(fpr: tuple, threshold: tuple, default: float, count: int) -> None:
    with pytest.raises(CalibrationError):
        ThresholdTable(fpr, threshold, default, count)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.lists(st.floats(-2e6, 2e6, width=32), min_size=2, max_size=20),
)
def test_the_share_below_a_value_lies_between_0_and_1_and_never_falls(
    samples: list[float], values: list[float]
) -> None:
    table = ThresholdTable.from_samples(samples, 0.01)
    shares = [table.share_below(value) for value in sorted(values)]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares == sorted(shares)
    assert table.share_below(table.at(0.0)) == 1.0
    assert table.share_below(min(table.threshold) - 1.0) == 0.0


def test_the_share_below_a_value_is_that_of_the_samples() -> None:
    samples = np.random.default_rng(0).normal(size=5000)
    table = ThresholdTable.from_samples(samples, 0.01)
    for value, tolerance in ((-1.0, 0.05), (0.0, 0.05), (1.0, 0.02), (2.0, 0.003), (3.0, 0.0005)):
        # The table has ten entries a decade: the smaller the rate, the finer.
        assert table.share_below(value) == pytest.approx(float(np.mean(samples < value)), abs=tolerance)
