"""The handshake between a line and a station: ready, trigger with part id, busy, result, acknowledge."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import ConfigError, shown
from .part import BY_SCORE, TIMEOUT, Choice, Trigger, Verdict
from .view import Counts, Phase, Reason, Reply, View

__all__ = ["LONGEST_PART_ID", "Handshake", "is_part_id"]

LONGEST_PART_ID = 64
"""Characters of the longest part id, as the register map has room for."""

_BEAT = 0.5  # seconds between two counts of the heartbeat
_MOST_UNTOLD = 1000  # missed parts and recipe choices that may wait for the station; with more, no trigger is accepted


_T = TypeVar("_T")


@dataclass(eq=False)
class _Job:
    """An accepted trigger; compared by identity, so that a repeated part id is another job."""

    trigger: Trigger
    owner: object
    deadline: float
    taken: bool = False


@dataclass(frozen=True, eq=False)
class _Outcome:
    job: _Job
    verdict: Verdict
    score: float
    reason: Reason
    text: str
    until: float


class Handshake:
    """One part at a time, from trigger to acknowledge; a `saae_runtime.line.part.TriggerSource` for the station.

    The line's side (PLC, OPC UA or HTTP client) triggers, reads and acknowledges; the station's side waits and
    answers. Thread-safe. Whatever happens to either side, a verdict is valid only for the part id beside it, and OK
    only if the station answered OK to that trigger in time:

    - no answer within `verdict_timeout` seconds of the trigger is NG with the reason "timeout"; a later answer is
      refused;
    - a trigger while a part is being judged or unacknowledged is refused and counted;
    - a result that is not acknowledged within `result_timeout` seconds, or whose client is lost, is withdrawn: no
      verdict is valid any more, and the line has to treat the part as NG;
    - the station is ready again only after it has finished the previous part, decided or not.

    Args:
        verdict_timeout: seconds.
        result_timeout: seconds.
        recipes: names that a trigger may request, read at every trigger; None: any.
        clock: monotonic, in seconds.

    Raises:
        ConfigError: a time that is not positive.
    """

    def __init__(
        self,
        verdict_timeout: float = 1.0,
        result_timeout: float = 10.0,
        recipes: Collection[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("verdict_timeout", verdict_timeout), ("result_timeout", result_timeout)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {shown(value)}.", "It is a time in seconds.", "use a value above 0")
        self.verdict_timeout = verdict_timeout
        self.result_timeout = result_timeout
        self._recipes = recipes
        self._clock = clock
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._outcome: _Outcome | None = None
        self._hand: _Job | None = None
        self._selected: str | None = None
        self._online = False
        self._closed = False
        self._fault = ""
        self._refusal = Reply.ACCEPTED
        self._counts = Counts()
        self._version = 0
        self._missed: deque[tuple[Trigger, str]] = deque()
        self._choices: deque[Choice] = deque()
        self._chosen: str | None = None
        self._waiting = 0
        self._heard = self._started = clock()
        self._beat = 0

    # --- the line's side ---

    def trigger(
        self, part_id: str, recipe: str | None = None, owner: object = None, who: str = "plc", role: str = "plc"
    ) -> Reply:
        """Ask for a verdict.

        Args:
            part_id: 1 to 64 printable ASCII characters, without a blank at either end.
            recipe: None: the selected one.
            owner: the client, for `lost`.
            who: name of the client, for the audit log.
            role: role of the client, for the audit log.
        """
        with self._changed:
            now = self._look()
            if not is_part_id(part_id):
                return self._refuse(Reply.BAD_PART)
            if recipe is not None and not self._knows(recipe):
                return self._refuse(Reply.BAD_RECIPE)
            reply = self._not_ready()
            if reply is not Reply.ACCEPTED:
                return self._refuse(reply)
            wanted = recipe if recipe is not None else self._selected
            self._choose(wanted, who, role)
            self._job = _Job(Trigger(part_id, wanted), owner, now + self.verdict_timeout)
            return self._accept(parts=1)

    def acknowledge(self, part_id: str) -> Reply:
        """Acknowledge the verdict of this part, which is then removed."""
        with self._changed:
            self._look()
            if self._outcome is None:
                return self._refuse(Reply.NO_RESULT)
            if self._outcome.job.trigger.part_id != part_id:
                return self._refuse(Reply.WRONG_PART)
            self._outcome = None
            return self._accept()

    def select(self, recipe: str | None, who: str = "plc", role: str = "plc") -> Reply:
        """Choose the recipe of triggers that name none; None: the station's. `who`, `role`: for the audit log."""
        with self._changed:
            self._look()
            if recipe is not None and not self._knows(recipe):
                return self._refuse(Reply.BAD_RECIPE)
            reply = self._not_ready()
            if reply is not Reply.ACCEPTED:
                return self._refuse(reply)
            self._selected = recipe
            self._choose(recipe, who, role)
            return self._accept()

    def reset(self) -> Reply:
        """Drop the current part, and the fault; the station sets a lasting fault again."""
        with self._changed:
            self._look()
            self._withdraw("reset")
            self._fault = ""
            return self._accept()

    def refuse(self, reply: Reply) -> Reply:
        """Count a command that the protocol server refuses, and show why."""
        with self._changed:
            self._look()
            return self._refuse(reply)

    def lost(self, owner: object) -> None:
        """The client that triggered is lost: withdraw its part."""
        with self._changed:
            self._look()
            job = self._job or (self._outcome.job if self._outcome else None)
            if job is not None and job.owner is owner:
                self._withdraw("client lost")
                self._touch()

    def view(self) -> View:
        """The current view of the line."""
        with self._changed:
            return self._view(self._look())

    def watch(self, version: int, timeout: float) -> View:
        """The view as soon as its version changes, or after `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                now = self._look()
                left = end - time.monotonic()
                if self._version != version or left <= 0:
                    return self._view(now)
                self._changed.wait(min(left, self._next_event(now)))

    # --- the station's side ---

    def wait(self, timeout: float) -> Trigger | None:
        """The next part, or None if none came within `timeout` seconds or the handshake is closed.

        From the first call on, the line sees a station. If the previous part was not answered, it is NG.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self._look_as_station()
            if self._closed:
                return None
            if self._hand is not None:
                if self._hand is self._job:
                    self._decide(Verdict.NG, math.nan, Reason.FAILED, "the station gave no verdict")
                self._hand = None
                self._touch()
            if not self._online:
                self._online = True
                self._touch()
            self._waiting += 1
            try:
                while True:
                    self._look()
                    if self._closed:
                        return None
                    if self._job is not None and not self._job.taken:
                        self._job.taken = True
                        self._hand = self._job
                        self._touch()
                        return self._job.trigger
                    left = end - time.monotonic()
                    if left <= 0:
                        return None
                    self._changed.wait(left)
            finally:
                self._waiting -= 1
                self._heard = self._clock()

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        """Give the verdict of the part that `wait` returned.

        An OK without a finite score is not a verdict, and the part is NG.

        Returns:
            False: the part is NG by timeout already, is no longer waited for, is another one, or the OK is invalid.
        """
        number = math.nan if score is None else float(score)
        if Verdict(verdict) is Verdict.OK and not math.isfinite(number):
            self._end(part_id, Verdict.NG, number, Reason.FAILED, "OK without a score")
            return False
        return self._end(part_id, Verdict(verdict), number, Reason.SCORE, BY_SCORE)

    def fail(self, part_id: str, reason: str) -> None:
        """The part that `wait` returned cannot be judged: it is NG for this reason."""
        code = Reason.TIMEOUT if reason == TIMEOUT else Reason.FAILED
        self._end(part_id, Verdict.NG, math.nan, code, reason)

    def fault(self, reason: str) -> None:
        """The station cannot judge parts until `recover` or `reset`; the current part is NG."""
        with self._changed:
            self._look_as_station()
            text = reason or "fault"
            if self._job is not None:
                self._decide(Verdict.NG, math.nan, Reason.FAULT, text)
            if self._fault != text:
                self._fault = text
                self._touch()

    def recover(self) -> None:
        """The station can judge again."""
        with self._changed:
            self._look_as_station()
            if self._fault:
                self._fault = ""
                self._touch()

    def close(self) -> None:
        """End waiting and withdraw everything; the line no longer sees a station. May be called twice."""
        with self._changed:
            self._look()
            if not self._closed:
                self._closed = True
                self._online = False
                self._withdraw("closed")
                self._hand = None
                self._touch()

    def missed(self) -> list[tuple[Trigger, str]]:
        """Parts that no station took since the last call, and why: each needs a record.

        While 1000 of them wait, no trigger is accepted, so that none is lost.
        """
        with self._changed:
            self._look()
            return self._fetched(self._missed)

    def choices(self) -> list[Choice]:
        """Changes of the recipe requested by the line since the last call, for the audit log."""
        with self._changed:
            return self._fetched(self._choices)

    # --- inside, with the lock held ---

    def _end(self, part_id: str, verdict: Verdict, score: float, reason: Reason, text: str) -> bool:
        with self._changed:
            self._look_as_station()
            if self._hand is None or self._hand.trigger.part_id != part_id:
                self._counts = replace(self._counts, late=self._counts.late + 1)
                self._touch()
                return False
            job, self._hand = self._hand, None
            self._touch()
            if job is not self._job:
                self._counts = replace(self._counts, late=self._counts.late + 1)
                return False
            self._decide(verdict, score, reason, text)
            return True

    def _decide(self, verdict: Verdict, score: float, reason: Reason, text: str) -> None:
        job = self._job
        assert job is not None
        self._job = None
        self._outcome = _Outcome(job, verdict, score, reason, text, self._clock() + self.result_timeout)
        counts = self._counts
        self._counts = replace(
            counts,
            ok=counts.ok + (verdict is Verdict.OK),
            ng=counts.ng + (verdict is not Verdict.OK),
            timeouts=counts.timeouts + (reason is Reason.TIMEOUT),
        )
        if not job.taken:
            self._missed.append((job.trigger, text))
        self._touch()

    def _withdraw(self, why: str) -> None:
        """Clear the part and its result from the view."""
        if self._job is None and self._outcome is None:
            return
        if self._job is not None and not self._job.taken:
            self._missed.append((self._job.trigger, why))
        self._job = self._outcome = None
        self._counts = replace(self._counts, withdrawn=self._counts.withdrawn + 1)
        self._touch()

    def _look(self) -> float:
        """Apply timeouts that have passed, and return the time."""
        now = self._clock()
        if self._job is not None and now >= self._job.deadline:
            self._decide(Verdict.NG, math.nan, Reason.TIMEOUT, TIMEOUT)
        if self._outcome is not None and now >= self._outcome.until:
            self._withdraw("not acknowledged")
        if self._waiting or now - self._heard <= self.verdict_timeout:
            self._beat = int((now - self._started) / _BEAT)
        return now

    def _look_as_station(self) -> None:
        self._heard = self._clock()
        self._look()

    def _next_event(self, now: float) -> float:
        times = [self._job.deadline] if self._job else []
        times += [self._outcome.until] if self._outcome else []
        return max(0.001, min(times) - now) if times else math.inf

    def _choose(self, recipe: str | None, who: str, role: str) -> None:
        if recipe != self._chosen:
            self._choices.append(Choice(self._chosen, recipe, who, role))
            self._chosen = recipe

    def _fetched(self, queue: deque[_T]) -> list[_T]:
        found = list(queue)
        queue.clear()
        if found:
            self._touch()  # the phase may have been offline for lack of room
        return found

    def _knows(self, recipe: str) -> bool:
        return self._recipes is None or recipe in self._recipes

    def _not_ready(self) -> Reply:
        if self._fault and not self._closed:
            return Reply.FAULT
        return {
            Phase.OFFLINE: Reply.OFFLINE,
            Phase.READY: Reply.ACCEPTED,
            Phase.RESULT: Reply.UNACKNOWLEDGED,
        }.get(self._phase(), Reply.BUSY)

    def _phase(self) -> Phase:
        if not self._online or len(self._missed) + len(self._choices) >= _MOST_UNTOLD:
            return Phase.OFFLINE
        if self._outcome is not None:
            return Phase.RESULT
        if self._job is not None:
            return Phase.BUSY if self._job.taken else Phase.TRIGGERED
        return Phase.CLEARING if self._hand is not None else Phase.READY

    def _refuse(self, reply: Reply) -> Reply:
        self._refusal = reply
        self._counts = replace(self._counts, refused=self._counts.refused + 1)
        self._touch()
        return reply

    def _accept(self, parts: int = 0) -> Reply:
        self._refusal = Reply.ACCEPTED
        self._counts = replace(self._counts, parts=self._counts.parts + parts)
        self._touch()
        return Reply.ACCEPTED

    def _touch(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _view(self, now: float) -> View:
        outcome = self._outcome
        job = self._job or (outcome.job if outcome else None)
        return View(
            phase=self._phase(),
            part_id=job.trigger.part_id if job else "",
            recipe=job.trigger.recipe if job else self._selected,
            valid=outcome is not None,
            verdict=outcome.verdict if outcome else Verdict.NG,
            score=outcome.score if outcome else math.nan,
            reason=outcome.reason if outcome else Reason.NONE,
            text=outcome.text if outcome else "",
            fault=self._fault,
            refusal=self._refusal,
            heartbeat=self._beat,
            counts=self._counts,
            version=self._version,
        )


def is_part_id(value: str) -> bool:
    """Whether this is a valid part id: 1 to 64 printable ASCII characters, without a blank at either end."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST_PART_ID
        and value.isascii()
        and value.isprintable()
        and value == value.strip()
    )
