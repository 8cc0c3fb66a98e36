"""One part on the line: its trigger, its verdict, and its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any, Protocol

from ..files import encodable

__all__ = ["BY_SCORE", "TIMEOUT", "Choice", "Part", "Trigger", "TriggerSource", "Verdict", "now", "stamp"]

BY_SCORE = "score"
"""Reason of a verdict by score."""

TIMEOUT = "timeout"
"""Reason of an NG without a verdict in time."""


class Verdict(str, Enum):
    """The station's verdict: OK, or NG for everything that is not known to be good."""

    OK = "OK"
    NG = "NG"


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(timezone.utc)


def stamp(time: datetime) -> str:
    """A time as in records: ISO 8601 in UTC, with microseconds, always of the same length."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Trigger:
    """A part that waits for its verdict.

    Attributes:
        part_id: the line's id; never empty.
        recipe: the recipe that the line requests; None: the station's.
        time: of the request, UTC.
        mark: tells it apart from parts of the same id and time; see `saae_runtime.line.camera.Shot`.
    """

    part_id: str
    recipe: str | None = None
    time: datetime = field(default_factory=now)
    mark: str = ""


@dataclass(frozen=True)
class Choice:
    """A change of the recipe, requested by the line.

    Attributes:
        before, after: recipes; None: the station's.
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
    """Where parts are requested and verdicts go: a PLC, an HTTP client, or the camera itself.

    One part at a time: a part from `wait` is answered or failed before the next `wait`.
    """

    def wait(self, timeout: float) -> Trigger | None:
        """The next part, or None if none came within `timeout` seconds."""

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        """Give a verdict. False: the part is NG by timeout already, or is not the waiting one."""

    def fail(self, part_id: str, reason: str) -> None:
        """The part cannot be judged: it is NG for this reason."""

    def fault(self, reason: str) -> None:
        """The station cannot judge parts until `recover`."""

    def recover(self) -> None:
        """The station can judge again."""

    def missed(self) -> list[tuple[Trigger, str]]:
        """Requested parts that `wait` never returned since the last call, and why. Each is NG."""

    def choices(self) -> list[Choice]:
        """Changes of the recipe requested by the line since the last call."""

    def close(self) -> None:
        """End waiting; `wait` returns None from then on. May be called twice."""


@dataclass(frozen=True)
class Part:
    """The record of a part: written once, never changed. `key` identifies the part, in every sink.

    Attributes:
        part_id, station, time: which part; the time is that of its trigger, UTC.
        recipe: the recipe that it was judged by; None if it was not judged.
        bundle: sha256 of the bundle's manifest.json, which has the hashes of all other files.
        score: image score, within the masks; None without a verdict by score.
        threshold: image threshold in force.
        pixel_threshold: pixel threshold T in force.
        verdict: OK or NG.
        reason: `score`, `timeout`, or `error: ...`.
        regions: as `saae_runtime.result.Region.to_dict`, strongest first.
        rank: share of the calibration's scores below this one, 0..1.
        source: name of the frame from the camera, such as a file's path.
        picture: name of the archived image, relative to the archive's folder; None if none is kept.
        latency_ms: from trigger to verdict, milliseconds.
        masks: the recipe's region of interest and ignored areas, as configured; None without any.
        recipe_version: counts the changes of the recipe (threshold, bundle, masks) since the service started, from 1.
        mark: tells it apart from parts of the same station, id and time; empty: nothing needs to.
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
    mark: str = ""

    @property
    def key(self) -> str:
        """Unique key: station, time of the trigger, part id, and what else tells the part apart."""
        return encodable("/".join((self.station, stamp(self.time), self.part_id, *([self.mark] if self.mark else []))))

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Bytes of a file name that are not UTF-8 are escaped, as `saae_runtime.files.encodable` does."""
        values = {
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
        return {name: encodable(value) if isinstance(value, str) else value for name, value in values.items()}

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: a number that is not finite.
        """
        return json.dumps(self.to_dict(), allow_nan=False)
