"""Drift: the stated false-alarm rate holds by simulation, and scores that move raise an alarm that ends with them."""

from __future__ import annotations

import numpy as np
import pytest
from needs import need

from saae_runtime.line.config import HealthConfig
from saae_runtime.line.drift import DriftMonitor, Limits, limits_for
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.thresholds import ThresholdTable


def alarms(limits: tuple[Limits, ...], windows: np.ndarray) -> float:
    """Share of the windows (rows) outside of any limit."""
    out = np.zeros(len(windows), np.bool_)
    for limit in limits:
        above = (windows > limit.mark).sum(axis=1)
        out |= (above > limit.high) | (above < limit.low)
    return float(out.mean())


def highest(rate: float, count: int) -> float:
    """What a share of `count` windows at `rate` stays below, but for one time in a million."""
    return rate + 5 * np.sqrt(rate / count) + 3 / count


@pytest.mark.parametrize(
    ("images", "rule", "window", "rate"),
    [
        (20, "quantile", 200, 0.001),
        (200, "quantile", 50, 0.01),
        (200, "quantile", 200, 0.001),
        (2000, "quantile", 200, 0.001),
        (200, "log-normal", 200, 0.001),
    ],
)
def test_the_stated_rate_of_false_alarms_holds(images: int, rule: str, window: int, rate: float) -> None:
    """100,000 windows, 1000 for each of 100 calibrations: nearly all of these keep the rate, and so does the mean."""
    random = np.random.default_rng(images + window)
    tables, each = 100, 1000
    found = []
    for _ in range(tables):
        scores = random.lognormal(0.3, 0.25, images)
        if rule == "quantile":
            table = ThresholdTable.from_samples(scores, 0.01)
        else:
            table = ThresholdTable.estimated(scores.tolist(), 0.05)
        limits = limits_for(table, window, rate)
        assert limits
        found.append(alarms(limits, random.lognormal(0.3, 0.25, (each, window))))
    assert np.mean(found) <= rate
    assert np.mean(np.array(found) > highest(rate, each)) <= 0.02


@pytest.mark.parametrize("images", [20, 50, 209, 2000])
def test_each_calibration_keeps_the_rate_but_for_one_in_a_hundred(images: int) -> None:
    """Exactly, where the scores' distribution is known: the shares above the marks, then the binomial tails."""
    scipy = need("scipy.stats")
    random = np.random.default_rng(images)
    window, rate, broken, tables = 200, 0.001, 0, 300
    for _ in range(tables):
        table = ThresholdTable.from_samples(random.lognormal(0.3, 0.25, images), 0.01)
        chance = 0.0
        for limit in limits_for(table, window, rate):
            share = scipy.lognorm.sf(limit.mark, 0.25, scale=np.exp(0.3))
            chance += scipy.binom.sf(limit.high, window, share) + scipy.binom.cdf(limit.low - 1, window, share)
        broken += chance > rate
    assert broken <= 0.01 * tables


def test_fewer_images_give_wider_limits() -> None:
    highs = []
    for images in (20, 30, 209, 2000):
        scores = np.random.default_rng(1).lognormal(0.3, 0.25, images)
        (_, upper) = limits_for(ThresholdTable.from_samples(scores, 0.01), 200, 0.001)
        highs.append(upper.high)
    assert highs == [104, 90, 53, 41]  # the figures of docs/line.md


def test_windows_drawn_from_the_calibration_scores_themselves() -> None:
    random = np.random.default_rng(7)
    scores = random.gamma(4.0, 1.0, 500)
    limits = limits_for(ThresholdTable.from_samples(scores, 0.01), 200, 0.001, 0.02)
    assert alarms(limits, random.choice(scores, (100_000, 200))) <= highest(0.001, 100_000)
    # and with as many defective parts as were said to be usual
    windows = random.choice(scores, (100_000, 200))
    windows[random.random(windows.shape) < 0.02] = 1e3
    assert alarms(limits, windows) <= highest(0.001, 100_000)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_scores_that_have_moved_are_seen(factor: float) -> None:
    random = np.random.default_rng(3)
    limits = limits_for(ThresholdTable.from_samples(random.lognormal(0.3, 0.25, 200), 0.01), 200, 0.001, 0.02)
    assert alarms(limits, factor * random.lognormal(0.3, 0.25, (1000, 200))) > 0.99


def test_a_handful_of_images_raises_no_alarm_by_itself() -> None:
    limits = limits_for(ThresholdTable.from_samples([1.0, 1.1, 1.2], 0.01), 50, 0.001)
    assert alarms(limits, np.random.default_rng(1).choice([1.0, 1.1, 1.2], (1000, 50))) == 0


def part(score: float | None, bundle: str = "b", masks: dict[str, object] | None = None) -> Part:
    return Part("p", "one", now(), Verdict.OK, "score", recipe="r", bundle=bundle, score=score, masks=masks)


def feed(monitor: DriftMonitor, scores: np.ndarray, table: ThresholdTable, **options: object) -> list[str]:
    said = [monitor.take(part(float(score), **options), table) for score in scores]  # type: ignore[arg-type]
    return [words for words in said if words is not None]


def test_an_alarm_begins_and_ends_once() -> None:
    random = np.random.default_rng(5)
    table = ThresholdTable.from_samples(random.lognormal(0, 0.3, 300), 0.01)
    monitor = DriftMonitor(HealthConfig(drift_window=100))
    assert feed(monitor, random.lognormal(0, 0.3, 500), table) == []
    (begins,) = feed(monitor, random.lognormal(0.5, 0.3, 200), table)
    assert "drift at station one, recipe r" in begins
    assert monitor.state()[0]["alarm"]
    assert monitor.take(part(None), table) is None
    (ends,) = feed(monitor, random.lognormal(0, 0.3, 300), table)
    assert "no drift any more" in ends
    state = monitor.state()[0]
    assert (state["alarm"], state["alarms"], state["words"]) == (False, 1, "")


def test_another_bundle_begins_anew() -> None:
    random = np.random.default_rng(6)
    table = ThresholdTable.from_samples(random.lognormal(0, 0.3, 300), 0.01)
    monitor = DriftMonitor(HealthConfig(drift_window=100))
    feed(monitor, random.lognormal(0.5, 0.3, 200), table)
    assert monitor.state()[0]["alarm"]
    feed(monitor, random.lognormal(0, 0.3, 1), table, bundle="c")
    assert not monitor.state()[0]["alarm"]


def test_with_masks_the_first_parts_are_the_reference() -> None:
    random = np.random.default_rng(8)
    table = ThresholdTable.from_samples(random.lognormal(2, 0.3, 300), 0.01)  # of whole frames: much higher
    monitor = DriftMonitor(HealthConfig(drift_window=100))
    assert feed(monitor, random.lognormal(0, 0.3, 1000), table, masks={"roi": []}) == []
    assert len(feed(monitor, random.lognormal(0.5, 0.3, 200), table, masks={"roi": []})) == 1


@pytest.mark.parametrize("images", [50, 200, 2000])
def test_a_line_of_good_parts_begins_few_alarms(images: int) -> None:
    """Windows that overlap, one for each part: an alarm begins less often than once in 10,000 parts."""
    random = np.random.default_rng(images)
    window, count, begun, lines = 200, 20_000, 0, 60
    for _ in range(lines):
        limits = limits_for(ThresholdTable.from_samples(random.lognormal(0, 0.3, images), 0.01), window, 0.001, 0.02)
        scores = random.lognormal(0, 0.3, count)
        out = np.zeros(count - window + 1, np.bool_)
        for limit in limits:
            sums = np.cumsum(np.r_[0, scores > limit.mark])
            above = sums[window:] - sums[:-window]
            out |= (above > limit.high) | (above < limit.low)
        begun += int(np.sum(out[1:] & ~out[:-1]))
    assert begun < lines * count / 10_000
