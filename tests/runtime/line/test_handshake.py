"""The handshake: never a verdict for the wrong part, never OK by default, whatever both sides do in any order."""

from __future__ import annotations

import math
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from saae_runtime.errors import ConfigError
from saae_runtime.line.handshake import Handshake, is_part_id
from saae_runtime.line.part import Verdict
from saae_runtime.line.view import Counts, Phase, Reason, Reply


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def at_work(**options: object) -> tuple[Handshake, Clock]:
    """A handshake whose station has part A in hand."""
    clock = Clock()
    handshake = Handshake(clock=clock, **options)  # type: ignore[arg-type]
    assert handshake.wait(0) is None
    assert handshake.trigger("A", owner="plc") is Reply.ACCEPTED
    taken = handshake.wait(0)
    assert taken is not None
    assert taken.part_id == "A"
    return handshake, clock


def test_a_part_from_trigger_to_acknowledge() -> None:
    clock = Clock()
    handshake = Handshake(clock=clock)
    first = handshake.view()
    assert (first.phase, first.ready, first.valid, first.ok, first.ng) == (Phase.OFFLINE, False, False, False, False)
    assert first.verdict is Verdict.NG
    assert handshake.trigger("A") is Reply.OFFLINE
    assert handshake.wait(0) is None
    assert handshake.view().ready
    assert handshake.trigger("A") is Reply.ACCEPTED
    assert handshake.view().phase is Phase.TRIGGERED
    trigger = handshake.wait(0)
    assert trigger is not None
    assert handshake.view().phase is Phase.BUSY
    assert handshake.answer(trigger.part_id, Verdict.OK, 12.5)
    view = handshake.view()
    assert (view.phase, view.part_id, view.ok, view.ng, view.score) == (Phase.RESULT, "A", True, False, 12.5)
    assert (view.reason, view.text) == (Reason.SCORE, "score")
    assert handshake.acknowledge("B") is Reply.WRONG_PART
    assert handshake.view().ok
    assert handshake.acknowledge("A") is Reply.ACCEPTED
    after = handshake.view()
    assert (after.ready, after.valid, after.ok, after.part_id) == (True, False, False, "")
    assert after.counts == Counts(parts=1, ok=1, refused=2)


def test_no_verdict_in_time_is_ng_and_says_so() -> None:
    handshake, clock = at_work(verdict_timeout=2.0)
    clock.now += 1.999
    assert not handshake.view().valid
    clock.now += 0.001
    view = handshake.view()
    assert (view.ng, view.ok, view.reason, view.text) == (True, False, Reason.TIMEOUT, "timeout")
    assert not handshake.answer("A", Verdict.OK, 1.0)
    assert handshake.view().ng
    assert handshake.view().counts == Counts(parts=1, ng=1, timeouts=1, late=1)


def test_the_station_is_not_ready_while_it_still_has_a_part_that_timed_out() -> None:
    handshake, clock = at_work(verdict_timeout=2.0)
    clock.now += 3
    assert handshake.acknowledge("A") is Reply.ACCEPTED
    assert handshake.view().phase is Phase.CLEARING
    # The same id again must not get the verdict of the part before.
    assert handshake.trigger("A") is Reply.BUSY
    assert not handshake.answer("A", Verdict.OK, 1.0)
    assert handshake.view().ready


@pytest.mark.parametrize("again", ["A", "B"])
def test_a_late_answer_never_reaches_the_next_part(again: str) -> None:
    handshake, _ = at_work()
    handshake.reset()
    assert handshake.trigger(again) is Reply.BUSY
    assert handshake.wait(0) is None  # the station has let go of it without a word
    assert handshake.trigger(again) is Reply.ACCEPTED
    assert not handshake.answer("A", Verdict.OK, 1.0)  # for the old one: the new one is not in its hand
    assert not handshake.view().valid
    assert handshake.wait(0) is not None
    assert handshake.answer(again, Verdict.OK, 1.0)


def test_a_trigger_in_work_is_refused_and_counted() -> None:
    handshake, _ = at_work()
    assert handshake.trigger("B") is Reply.BUSY
    view = handshake.view()
    assert (view.part_id, view.refusal, view.counts.refused) == ("A", Reply.BUSY, 1)
    handshake.answer("A", Verdict.NG, 99.0)
    assert handshake.trigger("B") is Reply.UNACKNOWLEDGED
    view = handshake.view()
    assert (view.part_id, view.ng, view.score, view.counts.refused) == ("A", True, 99.0, 2)


def test_a_result_that_nobody_acknowledges_is_withdrawn() -> None:
    handshake, clock = at_work(result_timeout=5.0)
    handshake.answer("A", Verdict.OK, 1.0)
    clock.now += 4.9
    assert handshake.view().ok
    clock.now += 0.1
    view = handshake.view()
    assert (view.valid, view.ok, view.part_id, view.counts.withdrawn, view.ready) == (False, False, "", 1, True)


@pytest.mark.parametrize("state", ["triggered", "busy", "result"])
def test_a_lost_client_leaves_nothing_valid(state: str) -> None:
    handshake = Handshake(clock=Clock())
    handshake.wait(0)
    handshake.trigger("A", owner="plc")
    if state != "triggered":
        handshake.wait(0)
    if state == "result":
        handshake.answer("A", Verdict.OK, 1.0)
    handshake.lost("another")
    assert handshake.view().part_id == "A"
    handshake.lost("plc")
    view = handshake.view()
    assert (view.valid, view.ok, view.part_id) == (False, False, "")
    assert handshake.answer("A", Verdict.OK, 1.0) is False
    assert not handshake.view().valid
    assert [trigger.part_id for trigger, _ in handshake.missed()] == (["A"] if state == "triggered" else [])


def test_a_fault_makes_the_part_ng_and_refuses_triggers() -> None:
    handshake, _ = at_work()
    handshake.fault("camera lost")
    view = handshake.view()
    assert (view.ng, view.reason, view.text, view.fault) == (True, Reason.FAULT, "camera lost", "camera lost")
    handshake.acknowledge("A")
    assert handshake.answer("A", Verdict.OK, 1.0) is False
    assert not handshake.view().ready
    assert handshake.trigger("B") is Reply.FAULT
    handshake.recover()
    assert handshake.view().ready
    handshake.fault("again")
    handshake.reset()
    assert handshake.view().ready


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_ok_without_a_score_is_ng(score: float | None) -> None:
    handshake, _ = at_work()
    assert not handshake.answer("A", Verdict.OK, score)
    view = handshake.view()
    assert (view.ng, view.ok, view.reason) == (True, False, Reason.FAILED)


def test_failed_and_unanswered_parts_are_ng() -> None:
    handshake, _ = at_work()
    handshake.fail("A", "no frame")
    assert (handshake.view().ng, handshake.view().text) == (True, "no frame")
    handshake, _ = at_work()
    assert handshake.wait(0) is None
    assert (handshake.view().ng, handshake.view().reason) == (True, Reason.FAILED)


def test_a_part_that_no_station_took_is_kept_for_the_record() -> None:
    clock = Clock()
    handshake = Handshake(clock=clock)
    handshake.wait(0)
    handshake.trigger("A")
    clock.now += 60
    assert [(trigger.part_id, why) for trigger, why in handshake.missed()] == [("A", "timeout")]
    assert handshake.missed() == []
    assert handshake.wait(0) is None


def test_recipes_are_selected_and_unknown_ones_refused() -> None:
    handshake = Handshake(recipes={"gear", "screw"})
    handshake.wait(0)
    assert handshake.select("nut") is Reply.BAD_RECIPE
    assert handshake.trigger("A", "nut") is Reply.BAD_RECIPE
    assert handshake.select("gear") is Reply.ACCEPTED
    assert handshake.view().recipe == "gear"
    handshake.trigger("A")
    assert handshake.select("screw") is Reply.BUSY
    trigger = handshake.wait(0)
    assert trigger is not None
    assert trigger.recipe == "gear"


@pytest.mark.parametrize("part_id", ["", " A", "A ", "A\n", "ä", "A" * 65, "\0", None, 7])
def test_bad_part_ids_are_refused(part_id: object) -> None:
    handshake = Handshake()
    handshake.wait(0)
    assert not is_part_id(part_id)  # type: ignore[arg-type]
    assert handshake.trigger(part_id) is Reply.BAD_PART  # type: ignore[arg-type]
    assert is_part_id("A" * 64)


def test_closing_ends_waits_and_withdraws() -> None:
    handshake, _ = at_work()
    handshake.answer("A", Verdict.OK, 1.0)
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(handshake.wait(60)))
    waiter.start()
    handshake.close()
    handshake.close()
    waiter.join(30)
    assert got == [None]
    assert handshake.wait(60) is None
    view = handshake.view()
    assert (view.phase, view.valid, view.ok) == (Phase.OFFLINE, False, False)
    assert handshake.trigger("B") is Reply.OFFLINE


def test_the_heartbeat_stops_with_the_station() -> None:
    handshake, clock = at_work(verdict_timeout=1.0)
    clock.now += 1.0
    alive = handshake.view().heartbeat
    assert alive == 2
    clock.now += 100
    assert handshake.view().heartbeat == alive
    handshake.wait(0)
    assert handshake.view().heartbeat > alive


def test_watch_returns_with_the_change() -> None:
    handshake, _ = at_work()
    version = handshake.view().version
    assert handshake.watch(version, 0).version == version
    seen: list[bool] = []
    watcher = threading.Thread(target=lambda: seen.append(handshake.watch(version, 60).ok))
    watcher.start()
    handshake.answer("A", Verdict.OK, 1.0)
    watcher.join(30)
    assert seen == [True]
    real = Handshake(verdict_timeout=0.05)
    real.wait(0)
    real.trigger("A")
    assert real.watch(real.view().version, 60).reason is Reason.TIMEOUT  # nobody else looks meanwhile


@pytest.mark.parametrize("options", [{"verdict_timeout": 0}, {"result_timeout": -1}, {"verdict_timeout": math.nan}])
def test_times_that_are_none_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Handshake(**options)


IDS = st.sampled_from(["A", "B", "C"])
OWNERS = st.sampled_from(["plc", "page", None])


class AnyOrder(RuleBasedStateMachine):
    """Both sides in any order; beside them the little that a verdict depends on, kept apart from the code."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.handshake = Handshake(verdict_timeout=2.0, result_timeout=5.0, clock=self.clock)
        self.number = 0  # of the last accepted trigger
        self.part: dict[int, str] = {}
        self.asked: dict[int, float] = {}
        self.owner: dict[int, object] = {}
        self.said: dict[int, tuple[Verdict, float]] = {}  # what the station said in time, for which trigger, and when
        self.gone: set[int] = set()  # triggers of which nothing may be shown any more
        self.hand: int | None = None
        self.taken: set[int] = set()
        self.online = self.closed = self.faulty = False

    @rule(part=IDS, owner=OWNERS)
    def trigger(self, part: str, owner: object) -> None:
        before = self.handshake.view()
        reply = self.handshake.trigger(part, owner=owner)
        assert reply.accepted == before.ready
        if reply.accepted:
            self.number += 1
            self.part[self.number], self.asked[self.number] = part, self.clock.now
            self.owner[self.number] = owner
        else:
            after = self.handshake.view()
            assert (after.part_id, after.valid, after.verdict) == (before.part_id, before.valid, before.verdict)
            assert after.counts.refused == before.counts.refused + 1

    @rule(part=IDS)
    def acknowledge(self, part: str) -> None:
        before = self.handshake.view()
        reply = self.handshake.acknowledge(part)
        assert reply.accepted == (before.valid and before.part_id == part)
        if reply.accepted:
            self.gone.add(self.number)

    @rule()
    def reset(self) -> None:
        self.handshake.reset()
        self.gone.add(self.number)
        self.faulty = False

    @rule(owner=st.sampled_from(["plc", "page"]))
    def lost(self, owner: str) -> None:
        self.handshake.lost(owner)
        if self.owner.get(self.number) == owner:
            self.gone.add(self.number)

    @rule()
    def wait(self) -> None:
        found = self.handshake.wait(0)
        if self.closed:
            assert found is None
            return
        self.online = True
        self.hand = None
        if found is not None:
            assert self.number not in self.taken  # no trigger is given twice
            assert found.part_id == self.part[self.number]
            self.taken.add(self.number)
            self.hand = self.number

    @rule(part=IDS, verdict=st.sampled_from(list(Verdict)), score=st.sampled_from([0.5, 70.0, math.nan]))
    def answer(self, part: str, verdict: Verdict, score: float) -> None:
        mine = self.hand is not None and self.part[self.hand] == part
        on_time = mine and self.clock.now < self.asked[self.hand] + 2.0 and self.hand not in self.gone
        took = self.handshake.answer(part, verdict, score)
        good = not (verdict is Verdict.OK and math.isnan(score))
        if mine:
            if on_time and not self.closed and self.hand not in self.said:
                self.said[self.hand] = (verdict if good else Verdict.NG, self.clock.now)
                assert took == good
            else:
                assert not took
            self.hand = None
        else:
            assert not took

    @precondition(lambda self: self.hand is not None)
    @rule()
    def fail(self) -> None:
        self.handshake.fail(self.part[self.hand], "no frame")
        if self.clock.now < self.asked[self.hand] + 2.0:
            self.said.setdefault(self.hand, (Verdict.NG, self.clock.now))
        self.hand = None

    @rule()
    def fault(self) -> None:
        self.handshake.fault("camera")
        if self.number and self.clock.now < self.asked[self.number] + 2.0:
            self.said.setdefault(self.number, (Verdict.NG, self.clock.now))
        self.faulty = True

    @rule()
    def recover(self) -> None:
        self.handshake.recover()
        self.faulty = False

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.number > 3)
    @rule()
    def close(self) -> None:
        self.handshake.close()
        self.closed, self.online, self.hand = True, False, None
        self.gone.add(self.number)

    @invariant()
    def what_the_line_sees_is_true(self) -> None:
        view = self.handshake.view()
        assert not (view.ok and view.ng)
        assert view.valid == (view.ok or view.ng) == (view.phase is Phase.RESULT)
        assert (view.part_id == "") == (view.phase in (Phase.OFFLINE, Phase.READY, Phase.CLEARING))
        assert view.counts.ok + view.counts.ng <= view.counts.parts == self.number
        if view.part_id:
            assert view.part_id == self.part[self.number]
            assert self.number not in self.gone
        if view.ok:  # the one thing that must never be wrong
            verdict, when = self.said[self.number]
            assert verdict is Verdict.OK
            assert self.clock.now - when < 5.0
        if view.valid and self.number not in self.said:
            assert view.reason in (Reason.TIMEOUT, Reason.FAILED)
            assert view.ng
        if view.ready:
            assert self.online
            assert self.hand is None
            assert not self.faulty
        if not view.valid:
            assert view.verdict is Verdict.NG
            assert math.isnan(view.score)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_many_threads_at_once() -> None:
    """Lines that trigger, acknowledge and get lost beside a station that is late now and then, on a real clock."""
    handshake = Handshake(verdict_timeout=0.02, result_timeout=0.05)
    stop = threading.Event()
    wrong: list[str] = []
    ok_seen: list[str] = []

    def station() -> None:
        while not stop.is_set():
            found = handshake.wait(0.01)
            if found is None:
                continue
            number = int(found.part_id[1:])
            if number % 7 == 0:
                time.sleep(0.03)
            handshake.answer(found.part_id, Verdict.OK if number % 3 == 0 else Verdict.NG, float(number))

    def line(owner: str, start: int) -> None:
        number = start
        while not stop.is_set():
            number += 2
            handshake.trigger(f"p{number}", owner=owner)
            view = handshake.view()
            for _ in range(5):
                if view.valid or stop.is_set():
                    break
                view = handshake.watch(view.version, 0.01)
            if view.ok:
                ok_seen.append(view.part_id)
                if int(view.part_id[1:]) % 3 or view.score != float(view.part_id[1:]):
                    wrong.append(view.part_id)
            handshake.acknowledge(view.part_id)
            if number % 11 == 0:
                handshake.lost(owner)

    threads = [threading.Thread(target=station)]
    threads += [threading.Thread(target=line, args=(f"line{start}", start)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(ok_seen) < 30 and time.monotonic() < end:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(ok_seen) >= 30
