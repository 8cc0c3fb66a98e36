"""One part on the line: what asked for its verdict, the verdict, and the record that is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any, Protocol

__all__ = ["BY_SCORE", "TIMEOUT", "Choice", "Part", "Trigger", "TriggerSource", "Verdict", "now", "stamp"]

BY_SCORE = "score"
"""Reason of a verdict that a score gave."""

TIMEOUT = "timeout"
"""Reason of an NG for want of a verdict in time."""


class Verdict(str, Enum):
    """What leaves the station: OK, or NG for everything that is not known to be good."""

    OK = "OK"
    NG = "NG"


def now() -> datetime:
    """This moment in UTC."""
    return datetime.now(timezone.utc)


def stamp(time: datetime) -> str:
    """A time as records write it: ISO 8601 in UTC, to the microsecond, always of the same length."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Trigger:
    """A part that waits for its verdict.

    Attributes:
        part_id: what the line calls it; never empty.
        recipe: the recipe that the line asks for; None: the station's own.
        time: when it was asked for, UTC.
    """

    part_id: str
    recipe: str | None = None
    time: datetime = field(default_factory=now)


@dataclass(frozen=True)
class Choice:
    """Another recipe, asked for by the line.

    Attributes:
        before, after: recipes; None: the station's own.
        who: name of the client: `modbus`, `opcua`, or a user of the HTTP service.
        role: `plc`, or the user's role.
        time: UTC.
    """

    before: str | None
    after: str | None
    who: str
    role: str
    time: datetime = field(default_factory=now)


class TriggerSource(Protocol):
    """Where parts are asked for, and where their verdicts go: a PLC, an HTTP client, or the camera itself.

    One part at a time: what `wait` gave is answered or failed before the next `wait`.
    """

    def wait(self, timeout: float) -> Trigger | None:
        """The next part, or None when none has come within so many seconds."""

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        """Give a verdict. False: timed out, the part is NG by timeout already, or it is not the one that waits."""

    def fail(self, part_id: str, reason: str) -> None:
        """The part cannot be judged: it is NG, for this reason."""

    def fault(self, reason: str) -> None:
        """The station cannot judge any part until `recover`."""

    def recover(self) -> None:
        """The station can judge again."""

    def missed(self) -> list[tuple[Trigger, str]]:
        """Parts that were asked for and that `wait` never gave, and why, since the last call. Each is NG."""

    def choices(self) -> list[Choice]:
        """Changes of the recipe that the line asks for, since the last call."""

    def close(self) -> None:
        """End waiting; `wait` gives None from then on. May be called twice."""


@dataclass(frozen=True)
class Part:
    """The record of a part: written once, never changed. `key` tells parts apart, in every sink.

    Attributes:
        part_id, station, time: which part; the time is that of its trigger, UTC.
        recipe: the recipe that it was judged by; None where it never got that far.
        bundle: sha256 of the recipe's bundle (of its manifest.json, which has the hashes of all other files).
        score: image score, within the masks; None without a verdict by score.
        threshold: image threshold in force.
        pixel_threshold: pixel threshold T in force.
        verdict: OK or NG.
        reason: `score`, `timeout`, or `error: ...`.
        regions: as `saae_runtime.result.Region.to_dict`, strongest first.
        rank: share of the calibration's scores below this one, 0..1.
        source: name of the frame as the camera gave it, such as a file's path.
        picture: name of the archived picture, relative to the archive's folder; None where none is kept.
        latency_ms: from trigger to verdict, milliseconds.
        masks: the recipe's region of interest and ignored areas, as configured; None where it has none.
        recipe_version: counts the changes of the recipe (threshold, bundle, masks) since the service started, from 1.
    """

    part_id: str
    station: str
    time: datetime
    verdict: Verdict
    reason: str
    recipe: str | None = None
    bundle: str | None = None
    score: float | None = None
    threshold: float | None = None
    pixel_threshold: float | None = None
    regions: tuple[Mapping[str, Any], ...] = ()
    rank: float | None = None
    source: str | None = None
    picture: str | None = None
    latency_ms: float | None = None
    masks: Mapping[str, Any] | None = None
    recipe_version: int = 1

    @property
    def key(self) -> str:
        """What makes it this part and no other: station, time of the trigger, part id."""
        return f"{self.station}/{stamp(self.time)}/{self.part_id}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "type": "part",
            "key": self.key,
            "part_id": self.part_id,
            "station": self.station,
            "time": stamp(self.time),
            "verdict": self.verdict.value,
            "reason": self.reason,
            "recipe": self.recipe,
            "recipe_version": self.recipe_version,
            "bundle": self.bundle,
            "score": self.score,
            "rank": self.rank,
            "threshold": self.threshold,
            "pixel_threshold": self.pixel_threshold,
            "regions": [dict(region) for region in self.regions],
            "source": self.source,
            "picture": self.picture,
            "latency_ms": self.latency_ms,
            "masks": self.masks,
        }

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: a number that is not finite.
        """
        return json.dumps(self.to_dict(), allow_nan=False)
