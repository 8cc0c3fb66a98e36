"""Reads line.toml, the description of a line, strictly."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import shown
from .tables import Problems, read, read_toml

__all__ = [
    "ArchiveConfig",
    "HealthConfig",
    "LineConfig",
    "LineOptions",
    "Polygon",
    "RecipeConfig",
    "SinkConfig",
    "StationConfig",
    "load_config",
]

Polygon = tuple[tuple[float, float], ...]
"""Corners (x, y) in pixels of the camera's frame."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_CORNERS = 1000
_FARTHEST = 1_000_000  # pixels; beyond, drawing overflows, and an area would be nothing


@dataclass(frozen=True)
class LineOptions:
    """`[line]`.

    Attributes:
        name: of the line, in topics and metrics.
        spool: folder of the spool, where records wait for their sinks; created if missing.
        spool_mb: size of the spool in megabytes; beyond it, the oldest records that a sink has not taken are dropped
            for this sink, and counted.
        sync_seconds: interval at which records are synced to disk; 0: each one at once.
    """

    name: str = "line"
    spool: str = "spool"
    spool_mb: float = 1000.0
    sync_seconds: float = 1.0

    def __post_init__(self) -> None:
        _check_name(self.name)
        _at_least(self.spool_mb, 1, "spool_mb")
        _at_least(self.sync_seconds, 0, "sync_seconds")


@dataclass(frozen=True)
class StationConfig:
    """`[[station]]`.

    Attributes:
        name: of the station, in records.
        camera: a folder, `watch:FOLDER`, a video file, `camera:0`, or another installed camera.
        camera_options: further options of that camera.
        trigger: `free`: each frame is a part; else the name of a trigger, such as `http`.
        recipes: recipes that may be used here; the first one is active at the start.
        queue: if frames of a free-running camera come faster than verdicts: `block`, or `drop-oldest`, which counts
            them.
        queue_size: frames that may wait.
        verdict_timeout: seconds from trigger to verdict, after which the part is NG.
        grab_timeout: seconds for a triggered camera to give its frame; None: `verdict_timeout`.
    """

    name: str
    camera: str
    recipes: tuple[str, ...]
    camera_options: Mapping[str, Any] = field(default_factory=dict)
    trigger: str = "free"
    queue: Literal["block", "drop-oldest"] = "block"
    queue_size: int = 8
    verdict_timeout: float = 2.0
    grab_timeout: float | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.recipes:
            raise ValueError("`recipes` is empty; name at least one")
        if len(set(self.recipes)) != len(self.recipes):
            raise ValueError("`recipes` names a recipe twice")
        if not 1 <= self.queue_size <= 1000:
            raise ValueError(f"`queue_size` is {self.queue_size}; allowed: 1 to 1000")
        _positive(self.verdict_timeout, "verdict_timeout")
        if self.grab_timeout is not None:
            _positive(self.grab_timeout, "grab_timeout")


@dataclass(frozen=True)
class RecipeConfig:
    """`[[recipe]]`.

    Attributes:
        name: of the recipe, in records.
        bundle: the bundle's folder.
        false_alarms: acceptable share of good parts called NG, 0..1, looked up in the bundle's table.
        threshold: image threshold itself, instead.
        pixel_fpr, pixel_threshold: the same for the pixels that outline a defect.
        roi: polygons, or a PNG with white pixels, to which judging is limited. Empty: everywhere.
        ignore: polygons, or a PNG with white pixels, which are not judged.
        part_ids: patterns such as `A-*`; a part whose id matches is judged by this recipe unless another is requested.
        backend, device, precision, threads: as for `saae-run`.
    """

    name: str
    bundle: str
    false_alarms: float | None = None
    threshold: float | None = None
    pixel_fpr: float | None = None
    pixel_threshold: float | None = None
    roi: str | tuple[Polygon, ...] = ()
    ignore: str | tuple[Polygon, ...] = ()
    part_ids: tuple[str, ...] = ()
    backend: str = "auto"
    device: int = 0
    precision: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        for rate, limit, names in (
            (self.false_alarms, self.threshold, ("false_alarms", "threshold")),
            (self.pixel_fpr, self.pixel_threshold, ("pixel_fpr", "pixel_threshold")),
        ):
            if rate is not None and limit is not None:
                raise ValueError(f"`{names[0]}` and `{names[1]}` exclude each other")
            if rate is not None and not 0.0 <= rate <= 1.0:
                raise ValueError(f"`{names[0]}` is {rate}; it must be a share from 0 to 1")
        for name, value in (("roi", self.roi), ("ignore", self.ignore)):
            for polygon in () if isinstance(value, str) else value:
                if not 3 <= len(polygon) <= _MOST_CORNERS:
                    raise ValueError(f"`{name}` has a polygon of {len(polygon)} corners; allowed: 3 to 1000")
                if any(not abs(place) <= _FARTHEST for corner in polygon for place in corner):
                    raise ValueError(f"`{name}` has a corner farther than {_FARTHEST:,} pixels from the frame's")
        if self.device < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError("`device` must be at least 0, `threads` at least 1")

    def takes(self, part_id: str) -> bool:
        """Whether the part's id matches a pattern of this recipe."""
        return any(fnmatch.fnmatchcase(part_id, pattern) for pattern in self.part_ids)


@dataclass(frozen=True)
class SinkConfig:
    """`[[sink]]`: `kind`, `name` (default: the kind), and the kind's own keys in `options`."""

    kind: str
    name: str
    options: Any


@dataclass(frozen=True)
class ArchiveConfig:
    """`[archive]`.

    Attributes:
        folder: the archive's folder; NG and OK images have separate folders, one per day.
        ok_share: share of OK parts whose image is kept, 0..1.
        format: png (exact), or jpg (smaller, not for calibration).
        overlays: whether to save a picture with heat and outline beside each NG image.
        ok_days, ng_days: how long images are kept; NG at least as long as OK.
        max_gb: size of the archive; the oldest OK images are removed first, then the oldest NG.
        min_free_gb: disk space that is kept free in the same way.
    """

    folder: str
    ok_share: float = 0.01
    format: Literal["png", "jpg"] = "png"
    overlays: bool = False
    ok_days: float = 7.0
    ng_days: float = 90.0
    max_gb: float = 20.0
    min_free_gb: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ok_share <= 1.0:
            raise ValueError(f"`ok_share` is {self.ok_share}; it must be a share from 0 to 1")
        for name in ("ok_days", "ng_days", "max_gb"):
            _positive(getattr(self, name), name)
        _at_least(self.min_free_gb, 0, "min_free_gb")
        if self.ng_days < self.ok_days:
            raise ValueError("`ng_days` is below `ok_days`; NG images must be kept at least as long")


@dataclass(frozen=True)
class HealthConfig:
    """`[health]`.

    Attributes:
        drift_window: number of parts whose scores are compared with the bundle's table together.
        drift_false_alarms: share of windows of good parts that may raise an alarm.
        drift_defects: share of parts that is usually NG; this many high scores are no drift.
        silent_seconds: a station that neither waits nor works for this long is not live.
    """

    drift_window: int = 200
    drift_false_alarms: float = 0.001
    drift_defects: float = 0.02
    silent_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 20 <= self.drift_window <= 100_000:
            raise ValueError(f"`drift_window` is {self.drift_window}; allowed: 20 to 100000")
        if not 1e-9 <= self.drift_false_alarms <= 0.5:
            raise ValueError(f"`drift_false_alarms` is {self.drift_false_alarms}; allowed: 1e-9 to 0.5")
        if not 0.0 <= self.drift_defects <= 0.5:
            raise ValueError(f"`drift_defects` is {self.drift_defects}; allowed: 0 to 0.5")
        _positive(self.silent_seconds, "silent_seconds")


@dataclass(frozen=True)
class LineConfig:
    """The whole file.

    Attributes:
        path: the file, absolute. Paths in it are relative to its folder; see `place`.
        extra: tables of other parts of the service (`[plc]`, `[http]`), each as its own dataclass.
    """

    path: Path
    line: LineOptions
    stations: tuple[StationConfig, ...]
    recipes: tuple[RecipeConfig, ...]
    sinks: tuple[SinkConfig, ...]
    archive: ArchiveConfig | None
    health: HealthConfig
    extra: Mapping[str, Any] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        """Resolve a path in the file, relative to the file's folder."""
        return self.path.parent / name

    def recipe(self, name: str) -> RecipeConfig:
        """The recipe of an existing name."""
        return next(item for item in self.recipes if item.name == name)


def load_config(path: Path, sinks: Mapping[str, type], sections: Mapping[str, type] | None = None) -> LineConfig:
    """Read a line.toml.

    Args:
        path: the file.
        sinks: kind -> dataclass of its options.
        sections: name of a further table -> its dataclass; missing tables are not in `extra`.

    Raises:
        ConfigError: lists all problems at once.
    """
    data = read_toml(path)
    problems = Problems(str(path))
    sections = sections or {}
    known = ["line", "station", "recipe", "sink", "archive", "health", *sections]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            problems.add("", f"unknown table `{shown(key)[1:-1]}`; {hint}")
    line = read(LineOptions, data.get("line", {}), "[line]", problems)
    stations = _several(StationConfig, data, "station", problems)
    recipes = _several(RecipeConfig, data, "recipe", problems)
    found = _sinks(data.get("sink", []), sinks, problems)
    archive = read(ArchiveConfig, data["archive"], "[archive]", problems) if "archive" in data else None
    health = read(HealthConfig, data.get("health", {}), "[health]", problems)
    extra = {name: read(kind, data[name], f"[{name}]", problems) for name, kind in sections.items() if name in data}
    _check_names(stations, "station", problems)
    _check_names(recipes, "recipe", problems)
    _check_names(found, "sink", problems)
    _check_recipes(stations, [item.name for item in recipes], data, problems)
    if not data.get("station"):
        problems.add("", "no [[station]]; a line has at least one")
    problems.raise_any()
    assert line is not None
    assert health is not None
    return LineConfig(path.resolve(), line, tuple(stations), tuple(recipes), tuple(found), archive, health, extra)


def _several(kind: type[Any], data: Mapping[str, Any], key: str, problems: Problems) -> list[Any]:
    tables = data.get(key, [])
    if not isinstance(tables, list):
        problems.add("", f"`[{key}]` is one table; write `[[{key}]]`, once for each {key}")
        return []
    found = [read(kind, table, _where(key, i, table), problems) for i, table in enumerate(tables, start=1)]
    return [item for item in found if item is not None]


def _where(key: str, number: int, table: Any) -> str:
    name = table.get("name") or table.get("kind") if isinstance(table, Mapping) else None
    return f"[[{key}]] {number}" + (f" ({shown(name, 40)[1:-1]})" if isinstance(name, str) else "")


def _sinks(tables: Any, kinds: Mapping[str, type], problems: Problems) -> list[SinkConfig]:
    if not isinstance(tables, list):
        problems.add("", "`[sink]` is one table; write `[[sink]]`, once for each sink")
        return []
    found: list[SinkConfig] = []
    for number, table in enumerate(tables, start=1):
        where = _where("sink", number, table)
        if not isinstance(table, Mapping):
            problems.add(where, f"expected a table, found {shown(table)}")
            continue
        kind, name = table.get("kind"), table.get("name", table.get("kind"))
        if not isinstance(kind, str) or kind not in kinds:
            near = difflib.get_close_matches(str(kind), list(kinds), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(kinds)}"
            problems.add(where, f"`kind` is {shown(kind) if 'kind' in table else 'missing'}; {hint}")
            continue
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.add(where, f"`name` is {shown(name)}; letters, digits, `.`, `_` and `-` are possible")
            continue
        rest = {key: value for key, value in table.items() if key not in ("kind", "name")}
        options = read(kinds[kind], rest, where, problems)
        if options is not None:
            found.append(SinkConfig(kind, name, options))
    return found


def _check_names(items: Sequence[Any], key: str, problems: Problems) -> None:
    names = [item.name for item in items]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(f"[[{key}]]", f"two are named `{name}`; a name is used once")


def _check_recipes(
    stations: Sequence[StationConfig], names: list[str], data: Mapping[str, Any], problems: Problems
) -> None:
    tables = data.get("recipe", [])
    written = [table.get("name") for table in tables if isinstance(table, Mapping)] if isinstance(tables, list) else []
    for station in stations:
        for recipe in station.recipes:
            if recipe not in names and recipe not in written:  # a station with its own problem is reported already
                near = difflib.get_close_matches(recipe, names, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"there is {', '.join(names) or 'none'}"
                problems.add(f"[[station]] {station.name}", f"no recipe is named `{shown(recipe)[1:-1]}`; {hint}")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"`name` is {shown(name)}; letters, digits, `.`, `_` and `-` are possible, 64 at most")


def _positive(value: float, name: str) -> None:
    if not value > 0:
        raise ValueError(f"`{name}` is {value}; it must be above 0")


def _at_least(value: float, least: float, name: str) -> None:
    if not value >= least:
        raise ValueError(f"`{name}` is {value}; at least {least:g}")
