"""Timing: which calls are counted, how turns are interleaved, and what the statistics say."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

from saae_train.experiments import timing


def test_timing_statistics() -> None:
    found = timing.Timing.of([i / 1000 for i in range(1, 101)])
    assert found.runs == 100
    assert found.median_ms == pytest.approx(50.5)
    assert found.p95_ms == pytest.approx(np.percentile(np.arange(1, 101), 95))
    assert found.p95_ms < found.p99_ms <= 100
    assert found.per_second == pytest.approx(1000 / 50.5)
    with pytest.raises(ValueError, match="no timed run"):
        timing.Timing.of([])


def test_each_turn_begins_with_a_call_that_is_not_counted() -> None:
    made: list[int] = []
    found = timing.timed_calls(lambda: made.append(1), 0.0)
    assert len(made) == len(found) + 1
    assert len(found) >= 2
    assert all(value >= 0 for value in found)


def test_timed_calls_keep_their_bounds() -> None:
    made: list[int] = []
    assert len(timing.timed_calls(lambda: made.append(1), 60.0, warm_up=2, fewest=1, most=3)) == 3
    assert len(made) == 5
    assert len(timing.timed_calls(lambda: made.append(1), 0.0, fewest=4, most=9)) == 4


def test_turns_go_round_and_all_values_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    order: list[str] = []

    def turn(name: str, value: float) -> timing.Turn:
        def run(seconds: float) -> list[float]:
            assert seconds == pytest.approx(0.5)
            assert not gc.isenabled()
            order.append(name)
            return [value]

        return run

    found = timing.interleaved({"a": turn("a", 1.0), "b": turn("b", 2.0)}, seconds=2.0)
    assert order == ["a", "b"] * 4
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert gc.isenabled()


def test_a_slow_entry_sits_out_and_its_turns_stay_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    order: list[str] = []

    def turn(name: str, takes: float) -> timing.Turn:
        def run(seconds: float) -> list[float]:
            nonlocal now
            now += takes
            order.append(name)
            return [takes]

        return run

    seen: list[tuple[int, int]] = []
    found = timing.interleaved(
        {"fast": turn("fast", 0.5), "slow": turn("slow", 3.0)}, 10.0, progress=lambda n, total: seen.append((n, total))
    )
    assert len(found["fast"]) == 20
    assert 10 <= sum(found["slow"]) <= 18
    places = [i for i, name in enumerate(order) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 6
    assert seen == [(n, 40) for n in range(40)]


def test_a_failing_turn_leaves_the_garbage_collector_on() -> None:
    def fail(seconds: float) -> list[float]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.interleaved({"a": fail}, seconds=0.1)
    assert gc.isenabled()


def test_stopwatch_stops_at_the_end_of_its_block() -> None:
    with timing.stopwatch() as seconds:
        assert seconds() >= 0
    assert seconds() == seconds()
