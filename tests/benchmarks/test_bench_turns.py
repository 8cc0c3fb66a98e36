"""Timing in turns: who is called when, what is counted, and what a stream's turn measures."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")

from tiny_bundle import gray_frame, make_tiny_bundle

from benchmarks import turns
from saae_runtime import Engine


def test_each_turn_begins_with_a_call_that_is_not_counted() -> None:
    made: list[int] = []
    found = turns.calls(lambda: made.append(1))(0.0)
    assert len(made) == len(found) + 1
    assert len(found) >= 2
    assert all(value >= 0 for value in found)


def test_turns_go_round_and_all_values_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    order: list[str] = []

    def turn(name: str, value: float) -> turns.Turn:
        def run(seconds: float) -> list[float]:
            assert seconds == pytest.approx(0.5)
            assert not gc.isenabled()
            order.append(name)
            return [value]

        return run

    found = turns.in_turns({"a": turn("a", 1.0), "b": turn("b", 2.0)}, seconds=2.0)
    assert order == ["a", "b"] * 4
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert gc.isenabled()


def test_a_slow_entry_sits_out_and_its_turns_stay_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now)
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: None)
    order: list[str] = []

    def turn(name: str, takes: float) -> turns.Turn:
        def run(seconds: float) -> list[float]:
            nonlocal now
            now += takes
            order.append(name)
            return [takes]

        return run

    seen: list[tuple[int, int]] = []
    found = turns.in_turns(
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
        turns.in_turns({"a": fail}, seconds=0.1)
    assert gc.isenabled()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_turn_ends_its_threads_and_gives_one_value(tmp_path: Path, batch: int) -> None:
    with Engine(make_tiny_bundle(tmp_path / "tiny"), backend="onnxruntime:cpu", threads=1) as engine:
        turn = turns.stream(engine, [gray_frame(), gray_frame((32, 40))], batch)
        for _ in range(2):
            (seconds,) = turn(0.0)
            assert seconds > 0
