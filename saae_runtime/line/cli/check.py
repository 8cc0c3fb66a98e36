"""`saae-line check`: opens everything that a line.toml names, and lists what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import SaaeError
from ...files import write_bytes
from ..camera import BadFrameError, EndOfFrames, NoFrameError
from ..config import LineConfig, RecipeConfig, StationConfig
from ..engines import Engines
from ..recipes import Recipe, RecipeBook
from ..service import OpenCamera, OpenTrigger, open_file_camera
from ..sinks import make_sink
from ..sinks.base import Sink

__all__ = ["Finding", "check_line"]

_FRAME = 5.0  # seconds for a camera's first frame


@dataclass(frozen=True)
class Finding:
    """One checked item: what, whether it works, and a text."""

    what: str
    good: bool
    words: str


def check_line(
    config: LineConfig,
    open_camera: OpenCamera | None = None,
    open_trigger: OpenTrigger | None = None,
    others: Mapping[str, Callable[[LineConfig], str]] | None = None,
) -> Iterator[Finding]:
    """Check each part of a line, and yield the results one by one.

    A frame of each camera is judged by each recipe of its station, which checks masks and thresholds, too. `others`
    checks further tables, if the file has them.
    """
    engines = Engines()
    books: dict[str, RecipeBook] = {}
    try:
        for recipe in config.recipes:
            yield _tried(f"recipe {recipe.name}", partial(_open, config, recipe, engines, books))
        for station in config.stations:
            look = partial(_look, config, station, open_camera or partial(open_file_camera, looking=True), books)
            yield _tried(f"station {station.name}", look)
            if open_trigger is not None and station.trigger != "free":
                yield _tried(f"trigger of {station.name}", partial(_listens, config, station, open_trigger))
        for sink in config.sinks:
            made = make_sink(sink, config.path.parent, config.line.name, looking=True)
            try:
                yield _tried(f"sink {sink.name}", partial(_described, made))
            finally:
                made.close()
        yield _tried("spool", lambda: _writable(config.place(config.line.spool)))
        if config.archive is not None:
            folder = config.place(config.archive.folder)
            yield _tried("archive", lambda: _writable(folder))
        for name, attempt in (others or {}).items():
            if name in config.extra:
                yield _tried(name, partial(attempt, config))
    finally:
        engines.close()


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, attempt())
    except SaaeError as error:
        return Finding(what, False, str(error))
    except Exception as error:
        return Finding(what, False, f"{type(error).__name__}: {error}")


def _open(config: LineConfig, recipe: RecipeConfig, engines: Engines, books: dict[str, RecipeBook]) -> str:
    books[recipe.name] = RecipeBook([recipe], config.path.parent, engines)
    found = books[recipe.name].get(recipe.name)
    backend = found.shared.engine.backend.description
    return f"threshold {found.threshold:.4g}, {backend}"


def _listens(config: LineConfig, station: StationConfig, open_trigger: OpenTrigger) -> str:
    source = open_trigger(config, station)
    if source is not None:
        source.close()
    return station.trigger


def _look(config: LineConfig, station: StationConfig, open_camera: OpenCamera, books: dict[str, RecipeBook]) -> str:
    camera, watched = open_camera(config, station), station.camera.startswith("watch:")
    try:
        if station.trigger != "free" and not watched:  # a trigger would leave out every image that is there
            camera.trigger()
        end = time.monotonic() + _FRAME
        while True:
            try:
                shot = camera.grab(max(end - time.monotonic(), 0.1))
                break
            except NoFrameError:
                if time.monotonic() > end:
                    if watched:
                        return "no image there yet"
                    raise
            except EndOfFrames:
                return "no frame there"
            except BadFrameError as error:
                return f"its first frame is bad: {error.what}"
    finally:
        camera.close()
    words = [f"{shot.frame.shape[1]} x {shot.frame.shape[0]} pixels"]
    for name in station.recipes:
        if name in books:
            recipe: Recipe = books[name].get(name)
            result = recipe.judge(shot.frame)
            words.append(f"{name}: score {result.score:.4g}, {'NG' if result.is_anomalous else 'OK'}")
    return "; ".join(words)


def _described(sink: Sink) -> str:
    sink.open()
    state = sink.state()
    return ", ".join(f"{key} {value}" for key, value in state.items())


def _writable(folder: Path) -> str:
    probe = folder / ".probe"
    write_bytes(probe, b"saae")
    probe.unlink()
    return str(folder)
