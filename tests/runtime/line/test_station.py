"""A station: every part gets one verdict in time, in order, for the right id; what is not known to be good is NG."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_parts import ListCamera, ListTrigger, bad, good, wait_until

from saae_runtime.errors import ConfigError, DeviceError, ImageError
from saae_runtime.line.camera import BadFrameError, NoFrameError
from saae_runtime.line.config import RecipeConfig, StationConfig
from saae_runtime.line.engines import Engines
from saae_runtime.line.part import Part, Verdict
from saae_runtime.line.recipes import Recipe, RecipeBook
from saae_runtime.line.station import Station
from saae_runtime.result import Result

OK, NG = Verdict.OK, Verdict.NG


@pytest.fixture
def book(tiny: Path, strict: Path, engines: Engines) -> RecipeBook:
    """Recipe `first` finds the spot, `blind` does not; ids `B-*` name `blind`."""
    configs = [
        RecipeConfig("first", str(tiny), threads=1),
        RecipeConfig("blind", str(strict), threads=1, part_ids=("B-*",)),
    ]
    return RecipeBook(configs, Path(), engines)


@contextmanager
def station(
    book: RecipeBook, camera: ListCamera, source: ListTrigger | None = None, judged: Any = None, **options: Any
) -> Iterator[tuple[Station, list[Part]]]:
    parts: list[Part] = []

    def note(part: Part, frame: Any, result: Result | None, recipe: Recipe | None) -> None:
        parts.append(part)
        if judged is not None:
            judged(part)

    config = StationConfig("one", "-", ("first", "blind"), **{"verdict_timeout": 20.0, **options})
    made = Station(config, camera, book, note, source)
    made.start()
    try:
        yield made, parts
    finally:
        made.close()
        assert made.join(20)


def test_each_frame_is_a_part_in_order(book: RecipeBook) -> None:
    frames = [bad() if index % 3 == 0 else good() for index in range(20)]
    with station(book, ListCamera(frames)) as (made, parts):
        assert made.finished.wait(20)
    assert [part.part_id for part in parts] == [f"frame-{number}" for number in range(1, 21)]
    assert [part.verdict for part in parts] == [NG if index % 3 == 0 else OK for index in range(20)]
    assert {part.reason for part in parts} == {"score"}
    assert parts[0].regions[0]["bbox"] == [19, 9, 35, 20]
    assert parts[1].regions == ()
    assert parts[0].bundle == book.get("first").bundle
    assert len({part.key for part in parts}) == 20
    assert made.reading().counts == {"OK": 13, "NG": 7, "timeout": 0, "error": 0, "missed": 0, "dropped": 0}
    assert all(part.latency_ms is not None and part.latency_ms > 0 for part in parts)


def test_a_part_that_is_asked_for_gets_its_own_verdict(book: RecipeBook) -> None:
    source, camera = ListTrigger(), ListCamera([bad(), good(), bad(), bad()], endless=True)
    with station(book, camera, source) as (_, parts):
        for part_id, recipe in (("a", None), ("b", None), ("c", "blind"), ("B-1", None)):
            source.ask(part_id, recipe)
        assert wait_until(lambda: len(parts) == 4)
    assert [(part_id, verdict) for part_id, verdict, _ in source.answers] == [
        ("a", NG),
        ("b", OK),
        ("c", OK),
        ("B-1", OK),
    ]
    assert [part.recipe for part in parts] == ["first", "first", "blind", "blind"]
    assert source.answers[2][2] == pytest.approx(127.0)
    assert camera.triggers == 4
    assert source.failures == []


@pytest.mark.parametrize(
    ("item", "recipe", "words"),
    [
        (NoFrameError("The camera gave no frame."), None, "gave no frame"),
        (DeviceError("The camera is gone."), None, "is gone"),
        (BadFrameError("The frame came broken."), None, "came broken"),
        (ZeroDivisionError("driver"), None, "driver"),
        (lambda: good()[:0], None, "no pixels"),
        (lambda: good().astype(float), None, "dtype float64"),
        (lambda: good(), "nonsense", "no recipe 'nonsense'"),
    ],
)
def test_what_cannot_be_judged_is_ng_and_says_why(book: RecipeBook, item: Any, recipe: str | None, words: str) -> None:
    source = ListTrigger()
    with station(book, ListCamera([item, good()], endless=True), source) as (made, parts):
        source.ask("x", recipe)
        source.ask("y")
        assert wait_until(lambda: len(parts) == 2)
    assert parts[0].verdict is NG
    assert parts[0].reason.startswith("error: ")
    assert words in parts[0].reason
    assert parts[0].score is None
    assert [part_id for part_id, _ in source.failures] == ["x"]
    assert (parts[1].part_id, parts[1].verdict) == ("y", OK)  # the station goes on
    assert made.reading().counts["error"] == 1
    assert words in str(made.reading().last_error)


def test_a_file_that_is_no_image_is_an_ng_part_of_its_name(book: RecipeBook) -> None:
    broken = ImageError("x.png: cannot be read.", "", "")
    items = [good(), BadFrameError(broken.what, name="pictures/x.png"), bad()]
    with station(book, ListCamera(items)) as (made, parts):
        assert made.finished.wait(20)
    assert [(part.part_id, part.verdict) for part in parts] == [("frame-1", OK), ("x", NG), ("frame-2", NG)]
    assert "cannot be read" in parts[1].reason


def test_a_verdict_that_nobody_takes_any_more_is_ng(book: RecipeBook) -> None:
    source = ListTrigger(accept=False)
    with station(book, ListCamera([good()], endless=True), source) as (_, parts):
        source.ask("late")
        assert wait_until(lambda: parts)
    assert (parts[0].verdict, parts[0].reason) == (NG, "timeout")
    assert parts[0].score == 0.0  # what it would have been stays known


def test_without_a_verdict_in_time_the_part_is_ng(book: RecipeBook, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    judge = Recipe.judge
    monkeypatch.setattr(Recipe, "judge", lambda self, frame: go.wait(60) and judge(self, frame))
    source = ListTrigger()
    with station(book, ListCamera([good()] * 4, endless=True), source, verdict_timeout=0.05) as (made, parts):
        source.ask("a")
        source.ask("b")
        assert wait_until(lambda: len(parts) == 2)
        assert [(part.part_id, part.verdict, part.reason) for part in parts] == [
            ("a", NG, "timeout"),
            ("b", NG, "timeout"),
        ]
        assert source.failures == [("a", "timeout"), ("b", "timeout")]
        assert made.stuck_seconds > 0
        go.set()
        assert wait_until(lambda: made.stuck_seconds == 0)
        monkeypatch.setattr(made, "config", StationConfig("one", "-", ("first",), verdict_timeout=20.0))
        source.ask("c")
        assert wait_until(lambda: len(parts) == 3)
    assert (parts[2].part_id, parts[2].verdict) == ("c", OK)
    assert [answer[0] for answer in source.answers] == ["c"]  # the late verdicts went nowhere


def test_behind_an_engine_that_hangs_no_frames_pile_up(book: RecipeBook, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    judge = Recipe.judge
    monkeypatch.setattr(Recipe, "judge", lambda self, frame: go.wait(60) and judge(self, frame))
    frames: list[weakref.ref[np.ndarray]] = []

    def frame() -> np.ndarray:
        frames.append(weakref.ref(made := good()))
        return made

    with station(book, ListCamera([frame] * 40, endless=True), verdict_timeout=0.01, queue_size=2) as (_, parts):
        assert wait_until(lambda: len(parts) == 40)
        assert {part.reason for part in parts} == {"timeout"}
        # the one that is computed, and the last ones, which the reader and the station may still hold
        assert wait_until(lambda: sum(alive() is not None for alive in frames) <= 4)
        go.set()


def test_frames_that_come_faster_are_dropped_oldest_first_and_counted(book: RecipeBook) -> None:
    go = threading.Event()

    def hold(part: Part) -> None:
        go.wait(60)

    camera = ListCamera([good()] * 50, live=True, endless=True)
    with station(book, camera, judged=hold, queue="drop-oldest", queue_size=3) as (made, parts):
        assert wait_until(lambda: camera.grabbed == 50)
        go.set()
        assert wait_until(lambda: len(parts) + made.reading().counts["dropped"] == 50)
        assert len(parts) <= 5
        assert parts[-1].source == "frame-50.png"


def test_frames_that_come_faster_may_hold_the_camera_up(book: RecipeBook) -> None:
    go = threading.Event()
    camera = ListCamera([good()] * 30)
    with station(book, camera, judged=lambda part: go.wait(60), queue="block", queue_size=3) as (made, parts):
        assert wait_until(lambda: camera.grabbed >= 4)
        assert camera.grabbed <= 6
        go.set()
        assert made.finished.wait(20)
    assert len(parts) == 30
    assert made.reading().counts["dropped"] == 0


def test_a_switch_under_load_loses_no_frame_and_mixes_no_verdicts(book: RecipeBook) -> None:
    camera = ListCamera([bad()] * 300)
    switched: list[str] = []
    with station(book, camera, queue_size=4) as (made, parts):
        for name in ("blind", "first") * 10:
            recipe = made.switch(name)
            switched.append(recipe.name)
            count = len(parts)
            wait_until(lambda count=count: len(parts) >= count + 8 or made.finished.is_set())
        assert made.finished.wait(30)
    assert len(parts) == 300
    assert [part.part_id for part in parts] == [f"frame-{number}" for number in range(1, 301)]
    for part in parts:
        assert part.recipe is not None
        assert part.verdict is (NG if part.recipe == "first" else OK)
        assert part.threshold == {"first": 40.0, "blind": 200.0}[part.recipe]
        assert part.bundle == book.get(part.recipe).bundle
    assert {part.recipe for part in parts} == {"first", "blind"}


def test_after_the_acknowledge_no_part_is_judged_by_the_recipe_before(book: RecipeBook) -> None:
    source = ListTrigger()
    with station(book, ListCamera([bad()] * 4, endless=True), source) as (made, parts):
        for number, name in enumerate(("first", "blind", "first", "blind")):
            assert made.switch(name).name == name
            source.ask(str(number))
            assert wait_until(lambda number=number: len(parts) > number)
        with pytest.raises(ConfigError, match="no recipe 'gone'"):
            made.switch("gone")
        assert made.recipe == "blind"
    assert [part.verdict for part in parts] == [NG, OK, NG, OK]


def test_a_bundle_changed_under_load_loses_no_frame(book: RecipeBook, tiny: Path, strict: Path) -> None:
    with station(book, ListCamera([bad()] * 200), queue_size=4) as (made, parts):
        for bundle in (strict, tiny, strict, tiny):
            count = len(parts)
            book.change("first", bundle=str(bundle))
            wait_until(lambda count=count: len(parts) >= count + 10 or made.finished.is_set())
        assert made.finished.wait(30)
    assert len(parts) == 200
    assert {part.reason for part in parts} == {"score"}
    for part in parts:
        assert part.verdict is (NG if part.threshold == 40.0 else OK)
    assert [part.recipe_version for part in parts] == sorted(part.recipe_version for part in parts)


def test_a_trigger_source_that_breaks_is_asked_again(book: RecipeBook) -> None:
    source = ListTrigger()
    wait, calls = source.wait, []

    def broken(timeout: float) -> Any:
        calls.append(timeout)
        if len(calls) < 3:
            raise OSError("the PLC has gone")
        return wait(timeout)

    source.wait = broken  # type: ignore[method-assign]
    source.ask("a")
    with station(book, ListCamera([good()], endless=True), source) as (made, parts):
        assert wait_until(lambda: parts)
    assert parts[0].verdict is OK
    assert made.reading().last_error == "the PLC has gone"


def test_an_answer_that_breaks_is_no_ok(book: RecipeBook) -> None:
    source = ListTrigger()

    def broken(*_: Any) -> bool:
        raise OSError("the PLC has gone")

    source.answer = broken  # type: ignore[method-assign]
    source.ask("a")
    with station(book, ListCamera([good()], endless=True), source) as (_, parts):
        assert wait_until(lambda: parts)
    assert parts[0].verdict is NG
    assert "could not be given: the PLC has gone" in parts[0].reason


def test_records_that_cannot_be_taken_stop_nothing(book: RecipeBook) -> None:
    def broken(part: Part) -> None:
        raise RuntimeError("no disk")

    with station(book, ListCamera([good()] * 3), judged=broken) as (made, parts):
        assert made.finished.wait(20)
    assert len(parts) == 3
    assert made.reading().counts["unrecorded"] == 3
