"""The scoring loop: order, errors in their place, stopping, batches, times and counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime import Engine
from saae_runtime.cli.scoring import Outcome, Summary, score_frames
from saae_runtime.errors import DeviceError, FrameError, ImageError
from saae_runtime.frames import Frames
from saae_runtime.sources.files import Frame, Source

SOURCE = Source("video", "line.mp4", PurePath("line"), path=Path("line.mp4"))
SPOT = (10, 20, 9, 14)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    need("onnxruntime")
    with Engine(make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"), threads=1) as engine:
        yield engine


def good(index: int, spot: tuple[int, int, int, int] | None = None) -> Frame:
    return Frame(SOURCE, index, gray_frame(spot=spot))


def bad(index: int) -> Frame:
    return Frame(SOURCE, index, None, ImageError(f"frame {index} is bad"))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pattern", ["x", "o", "xxox", "oxxoooxo", "oooooooxx", "d" * 9, "odxdo"])
def test_every_frame_has_its_outcome_in_order(engine: Engine, pattern: str, batch: int, live: bool) -> None:
    frames = [
        bad(index) if kind == "x" else good(index, SPOT if kind == "d" else None) for index, kind in enumerate(pattern)
    ]
    outcomes = list(score_frames(engine, iter(frames), batch=batch, live=live))
    assert [outcome.frame.index for outcome in outcomes] == list(range(len(pattern)))
    for outcome, frame, kind in zip(outcomes, frames, pattern, strict=True):
        if kind == "x":
            assert outcome.result is None
            assert outcome.error is frame.error
        else:
            assert outcome.error is None
            assert outcome.result is not None
            assert outcome.result.is_anomalous == (kind == "d")
            assert outcome.milliseconds is not None
            assert outcome.milliseconds > 0


@pytest.mark.parametrize("live", [False, True])
def test_frame_that_the_engine_refuses_does_not_end_the_run(engine: Engine, live: bool) -> None:
    frames = [good(0), bad(1), Frame(SOURCE, 2, np.zeros((4, 4), np.float32)), bad(3), good(4, SPOT)]
    outcomes = list(score_frames(engine, iter(frames), live=live))
    assert [outcome.frame.index for outcome in outcomes] == [0, 1, 2, 3, 4]
    assert isinstance(outcomes[2].error, FrameError)
    assert outcomes[4].result is not None
    assert outcomes[4].result.is_anomalous


@pytest.mark.parametrize("live", [False, True])
def test_source_that_dies_gives_what_came_before(engine: Engine, live: bool) -> None:
    def dying() -> Iterator[Frame]:
        yield good(0)
        yield bad(1)
        raise DeviceError("camera:0 has stopped giving frames.")

    outcomes = score_frames(engine, dying(), live=live)
    assert next(outcomes).frame.index == 0
    with pytest.raises(DeviceError):
        list(outcomes)


@pytest.mark.parametrize("live", [False, True])
def test_stop_takes_no_further_frame_and_closes_the_source(engine: Engine, live: bool) -> None:
    stop, closed, read = threading.Event(), threading.Event(), []

    def endless() -> Iterator[Frame]:
        try:
            while True:
                read.append(1)
                yield good(len(read) - 1)
        finally:
            closed.set()

    outcomes = []
    for outcome in score_frames(engine, endless(), live=live, stop=stop):
        outcomes.append(outcome)
        if len(outcomes) == 3:
            stop.set()
    assert [outcome.frame.index for outcome in outcomes] == list(range(len(outcomes)))
    assert len(outcomes) == len(read), "what had been read is still given"
    assert closed.is_set()


def test_leaving_early_closes_the_source(engine: Engine) -> None:
    closed = threading.Event()

    def endless() -> Iterator[Frame]:
        index = 0
        try:
            while True:
                yield good(index)
                index += 1
        finally:
            closed.set()

    outcomes = score_frames(engine, endless())
    next(outcomes)
    outcomes.close()
    assert closed.wait(5)


def test_summary_counts_and_quantiles(engine: Engine) -> None:
    summary = Summary()
    assert summary.milliseconds(0.5) is None
    assert summary.exit_code == 3, "a run without a single scored frame is not clean"
    clean, defect = engine(gray_frame()), engine(gray_frame(spot=SPOT))
    for milliseconds in range(1, 101):
        summary.add(Outcome(good(0), clean, float(milliseconds)))
    assert summary.exit_code == 0
    assert summary.milliseconds(0.5) == pytest.approx(50.5)
    assert summary.milliseconds(0.95) == pytest.approx(95.05)
    summary.add(Outcome(bad(1), error=ImageError("bad")))
    assert summary.exit_code == 3
    summary.add(Outcome(good(2), defect, 1.0))
    assert summary.exit_code == 1
    assert (summary.scored, summary.defects, summary.errors) == (101, 1, 1)
    assert summary.frames_per_second == pytest.approx(101 / summary.seconds)


@pytest.mark.parametrize("where", ["map", "frame"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_too_little_memory_for_one_frame_is_an_error_of_that_frame(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, batch: int, live: bool, where: str
) -> None:
    from saae_runtime import engine as engine_module
    from saae_runtime import geometry

    upsample, check = geometry.upsample_map, engine_module.as_frames

    def small(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if size == (9, 9):
            raise MemoryError
        return upsample(anomaly_map, size)

    def smaller(value: np.ndarray, white_level: int | None = None) -> Frames:
        if value.shape == (9, 9, 3):
            raise MemoryError
        return check(value, white_level)

    if where == "map":
        monkeypatch.setattr(geometry, "upsample_map", small)
    else:
        monkeypatch.setattr(engine_module, "as_frames", smaller)
    frames = [good(index, SPOT if index % 2 else None) for index in range(9)]
    frames[3] = Frame(SOURCE, 3, np.full((9, 9, 3), 128, np.uint8))
    frames[5] = bad(5)
    outcomes = list(score_frames(engine, iter(frames), batch=batch, live=live))
    assert [outcome.frame.index for outcome in outcomes] == list(range(9))
    for outcome in outcomes:
        if outcome.frame.index in (3, 5):
            assert outcome.error is not None
        else:
            assert outcome.result is not None
            assert outcome.result.is_anomalous == (outcome.frame.index % 2 == 1)
    assert "not enough memory" in outcomes[3].error.what
    assert "9 x 9" in outcomes[3].error.what
