"""A station that cannot judge shows a fault to whoever asks for parts, and clears it when it can again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_parts import ListCamera, ListTrigger, good, line_text, wait_until

from saae_runtime.errors import BackendError, DeviceError, FrameError
from saae_runtime.line import trouble
from saae_runtime.line.camera import Camera
from saae_runtime.line.cameras.reconnect import BackOff, LiveCamera, Picture
from saae_runtime.line.config import RecipeConfig, StationConfig, load_config
from saae_runtime.line.engines import Engines
from saae_runtime.line.handshake import Handshake
from saae_runtime.line.part import Part, Verdict
from saae_runtime.line.recipes import Recipe, RecipeBook
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.station import Station
from saae_runtime.line.view import Phase, Reply
from saae_runtime.line.wiring import SECTIONS, open_trigger


class Plug:
    """A camera that can be unplugged."""

    mode = "software"

    def __init__(self) -> None:
        self.there = threading.Event()
        self._asked = threading.Event()

    def connect(self) -> Plug:
        if not self.there.is_set():
            raise DeviceError("unplugged")
        return self

    def fetch(self, timeout: float) -> Picture | None:
        if not self.there.is_set():
            raise DeviceError("unplugged")
        if not self._asked.wait(0.01):
            return None
        self._asked.clear()
        return Picture(good())

    def trigger(self) -> None:
        self._asked.set()

    def flush(self) -> None:
        self._asked.clear()

    def close(self) -> None:
        pass


@pytest.fixture
def book(tiny: Path, engines: Engines) -> RecipeBook:
    return RecipeBook([RecipeConfig("first", str(tiny), threads=1)], Path(), engines)


@contextmanager
def asked(book: RecipeBook, camera: Camera, **options: Any) -> Iterator[tuple[Handshake, Station, list[Part]]]:
    parts: list[Part] = []
    config = StationConfig("one", "-", ("first",), verdict_timeout=options.pop("verdict_timeout", 20.0))
    handshake = Handshake(config.verdict_timeout, 60.0)
    made = Station(config, camera, book, lambda part, *_: parts.append(part), handshake, **options)
    made.start()
    try:
        yield handshake, made, parts
    finally:
        made.close()
        assert made.join(20)


def judged(handshake: Handshake, part_id: str) -> Verdict:
    """The verdict of a part, acknowledged."""
    assert wait_until(lambda: handshake.view().ready)
    assert handshake.trigger(part_id) is Reply.ACCEPTED
    assert wait_until(lambda: handshake.view().valid)
    view = handshake.view()
    assert view.part_id == part_id
    assert handshake.acknowledge(part_id) is Reply.ACCEPTED
    return view.verdict


def test_a_camera_that_is_away_is_a_fault_until_it_is_back(book: RecipeBook) -> None:
    plug = Plug()
    camera = LiveCamera("plug", plug.connect, silent_after=None, back_off=BackOff(0.01, 0.02))
    with asked(book, camera) as (handshake, made, _):
        assert wait_until(lambda: handshake.view().fault)
        for _ in range(2):
            view = handshake.view()
            assert "camera is disconnected" in view.fault
            assert "unplugged" in view.fault
            assert (view.ready, view.ok) == (False, False)
            assert handshake.trigger("A") is Reply.FAULT
            assert made.trouble
            plug.there.set()
            assert wait_until(lambda: not handshake.view().fault)
            assert judged(handshake, "B") is Verdict.OK
            assert not made.trouble
            plug.there.clear()
            assert wait_until(lambda: handshake.view().fault)


def test_the_control_cannot_reset_a_fault_that_lasts(book: RecipeBook) -> None:
    camera = LiveCamera("plug", Plug().connect, silent_after=None, back_off=BackOff(0.01, 0.02))
    with asked(book, camera) as (handshake, _, parts):
        assert wait_until(lambda: handshake.view().fault)
        handshake.reset()
        handshake.trigger("A")  # may come in between; then it is NG
        assert wait_until(lambda: handshake.view().fault)
        assert not handshake.view().ok
        assert all(part.verdict is Verdict.NG for part in parts)


def test_an_engine_that_fails_is_a_fault_until_it_works(book: RecipeBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "_PROBE", (0.05, 0.1))
    broken = threading.Event()
    judge = Recipe.judge

    def perhaps(recipe: Recipe, frame: np.ndarray) -> object:
        if broken.is_set():
            raise BackendError("The GPU has gone.")
        return judge(recipe, frame)

    monkeypatch.setattr(Recipe, "judge", perhaps)
    with asked(book, ListCamera((good() for _ in range(100)), live=True)) as (handshake, _, parts):
        assert judged(handshake, "A") is Verdict.OK
        broken.set()
        for name in ("B", "C", "D"):
            assert judged(handshake, name) is Verdict.NG
        assert wait_until(lambda: "GPU has gone" in handshake.view().fault)
        assert handshake.trigger("E") is Reply.FAULT
        broken.clear()
        assert wait_until(lambda: not handshake.view().fault)
        assert judged(handshake, "F") is Verdict.OK
    assert [part.part_id for part in parts] == ["A", "B", "C", "D", "F"]


def test_frames_that_do_not_fit_are_no_fault_of_the_engine(book: RecipeBook, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(recipe: Recipe, frame: np.ndarray) -> None:
        raise FrameError("The mask does not fit.")

    monkeypatch.setattr(Recipe, "judge", fails)
    with asked(book, ListCamera((good() for _ in range(100)), live=True)) as (handshake, made, _):
        for number in range(5):
            assert judged(handshake, f"p{number}") is Verdict.NG
        assert (handshake.view().fault, made.trouble) == ("", "")


def test_a_computation_that_hangs_is_a_fault(book: RecipeBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "_STUCK", 0.05)
    go = threading.Event()
    judge = Recipe.judge

    def hangs(recipe: Recipe, frame: np.ndarray) -> object:
        go.wait(60)
        return judge(recipe, frame)

    monkeypatch.setattr(Recipe, "judge", hangs)
    camera = ListCamera((good() for _ in range(100)), live=True)
    with asked(book, camera, verdict_timeout=0.2) as (handshake, _, _):
        assert judged(handshake, "A") is Verdict.NG
        assert wait_until(lambda: "overdue" in handshake.view().fault)
        go.set()
        assert wait_until(lambda: not handshake.view().fault)


def test_no_more_frames_is_a_fault(book: RecipeBook) -> None:
    with asked(book, ListCamera([good()])) as (handshake, _, _):
        assert judged(handshake, "A") is Verdict.OK
        assert judged(handshake, "B") is Verdict.NG
        assert wait_until(lambda: "no more frames" in handshake.view().fault)


def test_a_station_that_has_ended_is_seen_as_gone(book: RecipeBook) -> None:
    source = ListTrigger()
    config = StationConfig("one", "-", ("first",))
    made = Station(config, ListCamera([]), book, lambda *_: None, source)
    made.start()
    made.stop()
    assert made.finished.wait(20)
    assert source.wait(0) is None
    made.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_archive_that_has_stopped_is_a_fault_and_a_full_disk_is_none(tiny: Path, tmp_path: Path) -> None:
    station = 'trigger = "http"\nverdict_timeout = 20.0'
    text = line_text(tiny, station=station, more='[archive]\nfolder = "archive"\nok_share = 1.0\n')
    (tmp_path / "line.toml").write_text(text)
    (tmp_path / "archive").write_text("in the way of the folder")  # no picture can be written
    config = load_config(tmp_path / "line.toml", KINDS, SECTIONS)
    camera = ListCamera((good() for _ in range(100)), live=True)
    with Line(config, lambda *_: camera, open_trigger) as line:
        handshake = line.stations["one"].source
        archive = line._archive
        assert isinstance(handshake, Handshake)
        assert archive is not None
        line.start()
        assert judged(handshake, "A") is Verdict.OK
        assert wait_until(lambda: archive.state()["left_out"])
        assert judged(handshake, "B") is Verdict.OK
        assert (handshake.view().fault, line.health()["ready"]) == ("", True)

        def ends(work: object) -> None:
            raise SystemExit

        archive._write = ends  # type: ignore[method-assign]
        archive.put("OK/x.png", good(), None)
        assert wait_until(lambda: "archive" in handshake.view().fault)
        (shown,) = line.health()["stations"]
        assert (shown["ready"], shown["fault"]) == (False, "the image archive has stopped")
    assert handshake.view().phase is Phase.OFFLINE
