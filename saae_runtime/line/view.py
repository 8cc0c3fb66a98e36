"""The line's view of a handshake: the phase, the result, replies to commands, counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from .part import Verdict

__all__ = ["Counts", "Phase", "Reason", "Reply", "View"]


class Phase(str, Enum):
    """Phase of the handshake. A fault is no phase: see `View.fault`.

    Attributes:
        OFFLINE: the station has not started, or has closed.
        READY: waits for a trigger.
        TRIGGERED: a part was asked for, and the station has not taken it yet.
        BUSY: the station judges the part.
        RESULT: the verdict stands until it is acknowledged.
        CLEARING: there is nothing to show, and the station still works on a part that is no longer waited for.
    """

    OFFLINE = "offline"
    READY = "ready"
    TRIGGERED = "triggered"
    BUSY = "busy"
    RESULT = "result"
    CLEARING = "clearing"


class Reason(IntEnum):
    """Reason of a verdict."""

    NONE = 0
    SCORE = 1
    TIMEOUT = 2
    FAILED = 3
    FAULT = 4


class Reply(IntEnum):
    """Reply to a command. Everything except ACCEPTED is a refusal that changed nothing."""

    ACCEPTED = 0
    BUSY = 1
    UNACKNOWLEDGED = 2
    OFFLINE = 3
    FAULT = 4
    BAD_PART = 5
    BAD_RECIPE = 6
    WRONG_PART = 7
    NO_RESULT = 8
    NOT_ARMED = 9

    @property
    def accepted(self) -> bool:
        """Whether the command was carried out."""
        return self is Reply.ACCEPTED


@dataclass(frozen=True)
class Counts:
    """Counts since the start.

    Attributes:
        parts: triggers that were accepted.
        ok, ng: verdicts shown, for any reason.
        timeouts: NG without a verdict in time.
        late: answers after the part was decided or withdrawn.
        refused: commands that were refused.
        withdrawn: parts dropped before they were acknowledged: client lost, not acknowledged, reset, closed.
    """

    parts: int = 0
    ok: int = 0
    ng: int = 0
    timeouts: int = 0
    late: int = 0
    refused: int = 0
    withdrawn: int = 0


@dataclass(frozen=True)
class View:
    """Everything that the line sees, at one moment.

    Attributes:
        phase: see `Phase`.
        part_id: of the current part, or of the part with a result; else empty.
        recipe: requested for the current part, else the selected one; None: the station's.
        valid: whether `verdict` is valid.
        verdict: NG, unless the part `part_id` was judged OK.
        score: image score; nan without one.
        reason, text: why, as a code and as text.
        fault: why the station cannot judge now; empty: it can.
        refusal: the reply to the last refused command, until one is accepted.
        heartbeat: counts half seconds while the station is alive, from 0.
        counts: see `Counts`.
        version: changes with everything except the heartbeat.
    """

    phase: Phase
    part_id: str
    recipe: str | None
    valid: bool
    verdict: Verdict
    score: float
    reason: Reason
    text: str
    fault: str
    refusal: Reply
    heartbeat: int
    counts: Counts
    version: int

    @property
    def ready(self) -> bool:
        """Whether a trigger would be accepted."""
        return self.phase is Phase.READY and not self.fault

    @property
    def busy(self) -> bool:
        """Whether a part is being judged."""
        return self.phase in (Phase.TRIGGERED, Phase.BUSY, Phase.CLEARING)

    @property
    def ok(self) -> bool:
        """Whether the part was judged OK."""
        return self.valid and self.verdict is Verdict.OK

    @property
    def ng(self) -> bool:
        """Whether the part was judged NG."""
        return self.valid and self.verdict is not Verdict.OK
