"""What a turn of `Engine.stream` measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundle import gray_frame, make_tiny_bundle

from benchmarks.interleaved import stream, trigger
from saae_runtime import Engine

pytestmark = pytest.mark.needs("onnxruntime")


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_turn_ends_its_threads_and_gives_one_value(tmp_path: Path, batch: int) -> None:
    with Engine(make_tiny_bundle(tmp_path / "tiny"), backend="onnxruntime:cpu", threads=1) as engine:
        turn = stream(engine, [gray_frame(), gray_frame((32, 40))], batch)
        for _ in range(2):
            (seconds,) = turn(0.0)
            assert seconds > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_a_trigger_turn_times_every_batch_after_the_first(tmp_path: Path, batch: int) -> None:
    with Engine(make_tiny_bundle(tmp_path / "tiny"), backend="onnxruntime:cpu", threads=1) as engine:
        found = trigger(engine, [gray_frame(), gray_frame((32, 40))], batch)(0.0)
        assert len(found) >= 2
        assert all(seconds > 0 for seconds in found)
