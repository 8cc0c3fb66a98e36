"""What the line sees of a handshake: the phase, the result, replies to commands, counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from .part import Verdict

__all__ = ["Counts", "Phase", "Reason", "Reply", "View"]


class Phase(str, Enum):
    """Where the handshake is. A fault is no phase: see `View.fault`.

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
    """Why a verdict is what it is."""

    NONE = 0
    SCORE = 1
    TIMEOUT = 2
    FAILED = 3
    FAULT = 4


class Reply(IntEnum):
    """What became of a command. Everything but ACCEPTED is a refusal that changed nothing."""

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
    """What has happened since the start.

    Attributes:
        parts: triggers that were accepted.
        ok, ng: verdicts shown, by whatever reason.
        timeouts: NG for want of a verdict in time.
        late: answers that came when the part was decided or gone.
        refused: commands that were refused.
        withdrawn: parts dropped before they were acknowledged: client lost, nobody acknowledged, reset, closed.
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
    """Everything that the line may see, taken at one moment.

    Attributes:
        phase: see `Phase`.
        part_id: of the part in work, or whose result stands; else empty.
        recipe: that the part in work was asked for with, else the one that is selected; None: the station's own.
        valid: whether `verdict` is one; without it nothing is known of any part.
        verdict: NG, unless the part `part_id` was judged OK.
        score: image score; nan where there is none.
        reason, text: why, as a code and in words.
        fault: why the station cannot judge now; empty: it can.
        refusal: the reply to the last command that was refused, until one is accepted.
        heartbeat: counts half seconds while the station is alive, from 0.
        counts: see `Counts`.
        version: another one whenever something else in here has changed, but for the heartbeat.
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
        """Whether a part is in work."""
        return self.phase in (Phase.TRIGGERED, Phase.BUSY, Phase.CLEARING)

    @property
    def ok(self) -> bool:
        """Whether the part was judged OK."""
        return self.valid and self.verdict is Verdict.OK

    @property
    def ng(self) -> bool:
        """Whether the part was judged NG."""
        return self.valid and self.verdict is not Verdict.OK
