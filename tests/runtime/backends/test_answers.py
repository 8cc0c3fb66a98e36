"""`auto` passes over a backend whose answers on this machine differ from the bundle's."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fake_backends import (
    ANSWER,
    SIZE,
    FakeBackend,
    World,
    again,
    bundle_with_answers,
    chosen,
)

from saae_runtime import Engine
from saae_runtime.backends.answers import answer_check
from saae_runtime.backends.base import RawOutputs
from saae_runtime.errors import BackendUnavailableError
from saae_runtime.manifest import Artefact


def test_the_fastest_is_passed_over_where_its_answers_are_wrong(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bundle_with_answers(tmp_path / "b")
    assert chosen(bundle) == ("swift", "bf16")
    again(monkeypatch)
    world.off["swift", "bf16"] = 1.1 * 1e-2 * ANSWER  # just beyond the bound
    other = bundle_with_answers(tmp_path / "c")
    with caplog.at_level(logging.WARNING), Engine(other) as engine:
        assert (engine.backend.name, engine.backend.precision) == ("swift", "fp32")
        assert "swift bf16 not timed: on this machine its answers differ from the bundle's: a.png" in engine.explain()
    assert "swift bf16 is passed over" in caplog.text
    again(monkeypatch)
    assert chosen(other) == ("swift", "fp32")  # known from the file
    assert world.still_open == 0
    world.off["swift", "bf16"] = 0.9 * 1e-2 * ANSWER
    again(monkeypatch)
    assert chosen(bundle_with_answers(tmp_path / "d")) == ("swift", "bf16")


def test_wrong_answers_are_not_taken_for_want_of_others(world: World, tmp_path: Path) -> None:
    world.off = dict.fromkeys(world.speeds, float("nan"))
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(BackendUnavailableError, match="on this machine its answers"),
    ):
        Engine(bundle_with_answers(tmp_path / "b"))
    with Engine(tmp_path / "b", backend="slow") as engine:  # by name it is opened
        assert engine.backend.name == "slow"


def test_frames_of_another_size_are_not_compared(world: World, tmp_path: Path) -> None:
    world.off = dict.fromkeys(world.speeds, 9.0)
    assert chosen(bundle_with_answers(tmp_path / "b", (2 * SIZE[0], SIZE[1]))) == ("swift", "bf16")


@pytest.mark.parametrize("part", ["anomaly_map", "score"])
def test_map_and_score_are_each_compared(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    infer = FakeBackend.infer

    def wrong(backend: FakeBackend, frames: np.ndarray, threshold: float) -> RawOutputs:
        outputs = infer(backend, frames, threshold)
        if (backend.name, backend.precision) == ("swift", "bf16"):
            getattr(outputs, part)[..., -1] += 1.0  # one pixel, or the score
        return outputs

    monkeypatch.setattr(FakeBackend, "infer", wrong)
    assert chosen(bundle_with_answers(tmp_path / "b")) == ("swift", "fp32")


@pytest.mark.parametrize("error", [0.0, 0.005, 0.02])
def test_an_engine_that_nobody_compared_keeps_the_bounds_of_its_graph(tmp_path: Path, error: float) -> None:
    """Compiled elsewhere, or calibrated where it cannot run: it is compared before it may be chosen."""
    bundle = bundle_with_answers(tmp_path / "b")
    graph = bundle.artefacts(precision="fp32")[0]
    assert graph.parity is not None
    answer = ANSWER * (1 + error)

    class Engine32:
        frame_size = SIZE

        def infer(self, frames: np.ndarray, threshold: float) -> RawOutputs:
            maps = np.full((1, *SIZE), answer, np.float32)
            return RawOutputs(maps, np.array([answer], np.float32), maps > threshold)

    engine = Artefact("x.engine", "engine", "fp32", library="tensorrt", library_version="10.3", sm="sm89")
    said = answer_check(bundle)(Engine32(), engine)  # type: ignore[arg-type]
    assert bool(said) == (error > graph.parity.bound_map)
