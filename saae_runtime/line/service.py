"""The line: opens, runs, monitors and stops everything in a line.toml."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..meter import Meter, one_line
from ..result import Result
from .archive import Archive
from .camera import Camera
from .camera_files import open_files
from .config import LineConfig, StationConfig
from .drift import DriftMonitor
from .part import Choice, Part, TriggerSource, now, stamp
from .recipes import Recipe, RecipeBook, white_level_of
from .sinks import make_sink
from .sinks.delivery import Delivery
from .spool import Spool
from .station import Station

__all__ = ["STOP_SECONDS", "SWITCH_SECONDS", "Line", "OpenCamera", "OpenTrigger", "open_file_camera"]

SWITCH_SECONDS = 0.001
"""Seconds for which a thread keeps Python's lock while others wait, see `sys.setswitchinterval`: a thread of the HTTP
service must not delay a verdict by Python's default of 5 ms each time."""

STOP_SECONDS = 1.6
"""Longest time of `Line.close`, about: the current part, waiting frames, records and images."""

OpenCamera = Callable[[LineConfig, StationConfig], Camera]
"""Opens a station's camera."""

OpenTrigger = Callable[[LineConfig, StationConfig], "TriggerSource | None"]
"""Opens a station's trigger; None: each frame is a part."""

ChoiceListener = Callable[[Station, Choice], None]

Listener = Callable[[Part, "NDArray[np.uint8] | None", "Result | None"], None]


class Line:
    """A running line.

    Args:
        config: from `load_config`.
        open_camera: opens cameras, see `open_file_camera`.
        open_trigger: opens triggers by name; None: only `free` is possible.

    Attributes:
        book: the recipes.
        stations: by name.
        spool: holds waiting records.
        meter: errors outside the stations.

    Raises:
        SaaeError: something cannot be opened; everything is closed again.
    """

    def __init__(
        self, config: LineConfig, open_camera: OpenCamera | None = None, open_trigger: OpenTrigger | None = None
    ) -> None:
        self.config = config
        self.meter = Meter()
        self._listeners: list[Listener] = []
        self._choice_listener: ChoiceListener | None = None
        self._deliveries: list[Delivery] = []
        self._archive: Archive | None = None
        self._closed = False
        self._closing = threading.Lock()
        self._started = time.monotonic()
        self.stations: dict[str, Station] = {}
        self.drift = DriftMonitor(config.health)
        line = config.line
        self.book = RecipeBook(config.recipes, config.path.parent)
        try:
            self.spool = Spool(config.place(line.spool), int(line.spool_mb * 1e6), line.sync_seconds)
        except BaseException:
            self.book.close()
            raise
        try:
            for sink in config.sinks:
                made = make_sink(sink, config.path.parent, line.name)
                reader = self.spool.reader(sink.name)
                self._deliveries.append(Delivery(sink.name, made, reader, line.sync_seconds))
            if config.archive is not None:
                self._archive = Archive(
                    config.archive,
                    config.place(config.archive.folder),
                    memory=config.place(line.spool) / "archive.age",
                )
            for station in config.stations:
                self._add(station, open_camera or open_file_camera, open_trigger or _free_alone)
        except BaseException:
            self.close()
            raise

    def _add(self, station: StationConfig, open_camera: OpenCamera, open_trigger: OpenTrigger) -> None:
        source = open_trigger(self.config, station)
        try:
            camera = open_camera(self.config, station)
        except BaseException:
            if source is not None:
                source.close()
            raise
        self.stations[station.name] = Station(
            station, camera, self.book, self._judged, source, self._chose, self._stopped
        )

    def start(self) -> None:
        """Start the stations."""
        for station in self.stations.values():
            station.start()

    @property
    def finished(self) -> bool:
        """Whether every station has come to the end of its frames."""
        return all(station.finished.is_set() for station in self.stations.values())

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function for each part (record, frame, result), on the station's thread: it must not block.

        Returns:
            A function that ends it.
        """
        self._listeners.append(listener)

        def end() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return end

    def listen_to_choices(self, listener: ChoiceListener | None) -> None:
        """Call one function for each recipe requested by the line's control, instead of an event for the sinks."""
        self._choice_listener = listener

    @property
    def computing(self) -> bool:
        """Whether a station computes a verdict now."""
        return any(station.computing for station in self.stations.values())

    def record(self, part: Part, frame: NDArray[np.uint8] | None, result: Result | None, recipe: Recipe | None) -> None:
        """Keep the record, and perhaps the image, of a part that was not judged at a station."""
        self._judged(part, frame, result, recipe)

    def event(self, kind: str, station: str | None, data: Mapping[str, Any]) -> None:
        """Write an event other than a part, such as an alarm, for every sink.

        Args:
            kind: of the event, such as `drift`.
            station: name of the station; None: the line.
            data: JSON values.
        """
        moment = stamp(now())
        record = {"type": kind, "key": f"{kind}/{station or ''}/{moment}", "time": moment, "station": station, **data}
        self.spool.append(record["key"], json.dumps(record, allow_nan=False).encode("ascii"))

    def _chose(self, station: Station, choice: Choice) -> None:
        if self._choice_listener is not None:
            self._choice_listener(station, choice)
        else:
            data = {"before": choice.before, "after": choice.after, "who": choice.who, "role": choice.role}
            self.event("recipe", station.name, data)

    def _stopped(self) -> str:
        """Shared parts that have failed; empty if none has. A full disk is not a failure: only images are lost."""
        return "" if self._archive is None or self._archive.alive else "the image archive has stopped"

    def _judged(
        self, part: Part, frame: NDArray[np.uint8] | None, result: Result | None, recipe: Recipe | None
    ) -> None:
        picture = self._archive.plan(part) if self._archive is not None and frame is not None else None
        part = replace(part, picture=picture)
        if not self.spool.append(part.key, part.to_json().encode("ascii")):
            self.meter.fail(f"part {part.key} has a record already, and gets no second one")
        if picture is not None and self._archive is not None and frame is not None:
            self._archive.put(picture, frame, result)
        try:
            if recipe is not None and result is not None:
                words = self.drift.take(part, recipe.table)
                if words is not None:
                    self.event("drift", part.station, {"recipe": part.recipe, "words": words})
            for listener in list(self._listeners):
                listener(part, frame, result)
        except Exception as error:  # the record is written; errors afterwards must not stop the line
            self.meter.fail(error)

    def health(self) -> dict[str, Any]:
        """Health of stations, sinks, spool, archive, drift, and of the line, as JSON values."""
        stations = [self._station_health(station) for station in self.stations.values()]
        reading = self.meter.read()
        return {
            "line": self.config.line.name,
            "time": stamp(now()),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "ready": not self._closed and all(item["ready"] for item in stations),
            "live": all(item["live"] for item in stations),
            "stations": stations,
            "sinks": [delivery.state() for delivery in self._deliveries],
            "spool": asdict(self.spool.stats)
            | {"last_error": None if self.spool.last_error is None else one_line(self.spool.last_error.what)},
            "archive": None if self._archive is None else self._archive.state(),
            "drift": self.drift.state(),
            "recipes": self.book.to_dict(),
            "last_error": reading.last_error,
        }

    def _station_health(self, station: Station) -> dict[str, Any]:
        reading, camera = station.reading(), station.camera_stats
        finished = station.finished.is_set()
        patience = self.config.health.silent_seconds + station.config.verdict_timeout
        stuck = station.stuck_seconds
        trouble = station.trouble
        return {
            "name": station.name,
            "recipe": station.recipe,
            "finished": finished,
            "ready": not trouble and not finished,
            "fault": trouble,
            "live": finished or (reading.idle_seconds < patience and stuck < patience),
            "camera_connected": camera.connected,
            "camera": asdict(camera),
            **reading.to_dict(),
        }

    def close(self) -> None:
        """Stop within about `STOP_SECONDS`: finish current parts, write records and images. May be called twice.

        Waiting frames that are not judged by then are counted as dropped. Records that a remote sink does not take in
        time stay in the spool for the next start.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
        start = time.monotonic()
        for station in self.stations.values():
            station.stop()
        for station in self.stations.values():
            station.join(max(start + 0.35 * STOP_SECONDS - time.monotonic(), 0.0))
        for station in self.stations.values():
            station.drop_waiting()
        for station in self.stations.values():
            station.join(max(start + 0.5 * STOP_SECONDS - time.monotonic(), 0.0))
        deadline = start + STOP_SECONDS - 0.2
        # A camera may hang in its driver: close them in parallel, and leave a hanging one.
        threads = [threading.Thread(target=station.close, daemon=True) for station in self.stations.values()]
        threads += [threading.Thread(target=item.finish, args=(deadline,), daemon=True) for item in self._deliveries]
        if self._archive is not None:
            threads.append(threading.Thread(target=self._archive.finish, args=(deadline,), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(start + STOP_SECONDS - time.monotonic(), 0.05))
        self.spool.close()
        self.book.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file_camera(config: LineConfig, station: StationConfig, looking: bool = False) -> Camera:
    """Open files, folders and videos as cameras; see `saae_runtime.line.camera_files.open_files`.

    `looking`: write nothing beside the line that may be running.

    Raises:
        ConfigError, DataError: nothing found, an unknown option, or recipes with different white levels.
    """
    spec = station.camera
    kind, colon, rest = spec.partition(":")
    options = dict(station.camera_options)
    if kind == "watch" and colon:
        spec = f"watch:{config.place(rest)}"
        resume = options.pop("resume", True)
        options["memory"] = config.place(config.line.spool) / f"{station.name}.seen" if resume else None
    else:
        spec = str(config.place(spec))
    known = {"recursive": bool, "interval": (int, float), "repeat": bool, "white_level": int, "memory": object}
    for key, value in options.items():
        if key not in known or not isinstance(value, known[key]):  # type: ignore[arg-type]
            raise ConfigError(
                f"Station {station.name}: `camera_options` {key} = {value!r} is not possible for {station.camera}.",
                "",
                "recursive = true, white_level = 4095, interval = 0.5, repeat = true, or resume = false with watch:",
            )
    options["white_level"] = white_level_of(config, station)
    return open_files(spec, **options, looking=looking)


def _free_alone(config: LineConfig, station: StationConfig) -> None:
    if station.trigger != "free":
        raise ConfigError(f"Station {station.name}: no trigger is named {station.trigger}.", "", 'trigger = "free"')
