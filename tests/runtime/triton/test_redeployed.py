"""A server whose model is replaced: no frame is judged by the thresholds of the model before."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_triton import SIZE, FakeTriton, fake_triton

from saae_runtime import TritonEngine
from saae_runtime.errors import BackendError, BackendUnavailableError
from saae_runtime.triton import watch

pytestmark = pytest.mark.needs("tritonclient")

FRAME = np.zeros((*SIZE, 3), np.uint8)
WAYS = {
    "call": lambda engine: engine(FRAME),
    "verdict": lambda engine: engine.verdict(FRAME),
    "stream": lambda engine: next(iter(engine.stream([FRAME]))),
}


@pytest.fixture(params=["grpc", "http"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeTriton]:
    with fake_triton(request.param) as found:
        yield found


def opened(fake: FakeTriton, **options: Any) -> TritonEngine:
    return TritonEngine(f"{fake.protocol}://127.0.0.1:{fake.port}", "tiny", timeout=5, **options)


def replace(fake: FakeTriton) -> None:
    """The same part scores ten times as much, and so is T."""
    fake.score, fake.known, fake.threshold = 300.0, 300.0, 400.0


def fail(fake: FakeTriton, engine: TritonEngine) -> None:
    fake.down = True
    with pytest.raises(BackendUnavailableError):
        engine(FRAME)
    fake.down = False


@pytest.mark.parametrize("way", WAYS)
def test_another_model_after_an_outage_is_refused(fake: FakeTriton, way: str) -> None:
    with opened(fake) as engine:
        assert not WAYS[way](engine).is_anomalous
        fail(fake, engine)
        replace(fake)
        for _ in range(2):
            with pytest.raises(BackendError, match="Another model is served") as caught:
                WAYS[way](engine)
        assert "open a new engine" in caught.value.cure
    with opened(fake) as engine:
        assert not WAYS[way](engine).is_anomalous
        assert engine.threshold == 400.0


def test_the_same_model_after_an_outage_is_used_again(fake: FakeTriton) -> None:
    with opened(fake) as engine:
        fail(fake, engine)
        before = len(fake.calls)
        assert engine(FRAME).score == 30.0
        assert fake.calls[before:] == ["infer", "config", "infer"]  # the known frame is the last
        assert engine(FRAME).score == 30.0
        assert fake.calls[before + 3 :] == ["infer"]


def test_a_server_that_comes_back_with_wrong_scores_is_refused(fake: FakeTriton) -> None:
    with opened(fake) as engine, opened(fake, verify=False) as trusting:
        for each in (engine, trusting):
            fail(fake, each)
        fake.score = 31.0
        for _ in range(2):
            with pytest.raises(BackendError, match="wrong scores"):
                engine(FRAME)
        assert trusting(FRAME).score == 31.0
        fake.score = 30.0
        assert engine(FRAME).score == 30.0


def test_an_outage_amid_the_question_leaves_the_doubt(fake: FakeTriton) -> None:
    with opened(fake) as engine:
        fail(fake, engine)
        fake.fails = {"config"}
        with pytest.raises(BackendUnavailableError):
            engine(FRAME)
        fake.fails = set()
        replace(fake)
        with pytest.raises(BackendError, match="Another model is served"):
            engine(FRAME)


def test_a_reload_without_an_outage_is_noticed(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    with opened(fake) as engine:
        before = len(fake.calls)
        for _ in range(3):
            engine(FRAME)
        assert fake.calls[before:] == ["infer"] * 3
        now = 3.5
        for _ in range(3):
            engine(FRAME)
        assert fake.calls[before + 3 :] == ["infer", "config", "infer", "infer"]  # asked once, without the known frame
        replace(fake)
        now = 7.0
        with pytest.raises(BackendError, match="Another model is served"):
            engine(FRAME)


def test_a_model_of_another_size_is_named_instead_of_its_complaint(fake: FakeTriton) -> None:
    with opened(fake) as engine:
        replace(fake)
        fake.size = (8, 8)
        with pytest.raises(BackendError, match="Another model is served"):
            engine(FRAME)
