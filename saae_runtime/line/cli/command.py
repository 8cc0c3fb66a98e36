"""The command `saae-line`: run a line.toml, check it, write an example."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ...bundle import open_bundle
from ...errors import ConfigError
from ...files import write_text
from ...leave import stopped_by_signals
from ...terminal import LineCommand, command_group, log
from ...terminal import run_command as run
from ..config import LineConfig, load_config
from ..part import Part
from ..service import SWITCH_SECONDS, Line
from ..sinks import KINDS
from ..systemd import notify, watchdog_seconds
from ..wiring import SECTIONS, check_http, open_any_camera, open_http, open_trigger
from .audit import audit_app
from .check import check_line
from .example import example
from .recalibrate import recalibrate_command

__all__ = ["app", "main"]

app = command_group("Run inspection stations from one file: cameras, recipes, records, images.")

_TICK = 0.2  # seconds between two checks of the main thread
_PRINTED = 1000  # lines that may wait for a slow reader

File = Annotated[Path, typer.Argument(help="The line.toml.")]


def run_command(
    file: File = Path("line.toml"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line for each part.")] = False,
) -> None:
    """Run a line until Ctrl-C or SIGTERM, or until every station has come to the end of its files.

    One line for each part goes to standard output; everything else to standard error. Exit codes: 0 ended or stopped
    as asked, with everything written; 2 the file or the machine is at fault; 4 records were lost.
    """
    console = log()
    config = _load(file)
    stop = threading.Event()
    sys.setswitchinterval(SWITCH_SECONDS)
    with (
        Line(config, open_any_camera, open_trigger) as line,
        open_http(line) as http,
        stopped_by_signals(stop) as received,  # an earlier stop ends the start itself
    ):
        printer = None if quiet else _Printer()
        if printer is not None:
            line.listen(lambda part, frame, result: printer.say(part))
        line.start()
        count = len(line.stations)
        console.print(f"{config.line.name}: {count} station{'' if count == 1 else 's'}; stop with Ctrl-C")
        if http is not None:
            console.print(f"page: {http.url}")
        notify(f"READY=1\nSTATUS={count} stations")
        _wait(line, stop)
        console.print(f"stopping{' as asked' if received else ''}")
        notify("STOPPING=1")
        if http is not None:
            http.stop()
        line.close()
        if http is not None:
            http.close()
        if printer is not None:
            printer.finish()
        health = line.health()
    lost = _summarize(console, health)
    raise typer.Exit(4 if lost else 0)


def check_command(file: File = Path("line.toml")) -> None:
    """Open everything that a line.toml names, judge a frame of each camera, and list what is missing.

    Exit codes: 0 everything is there, 2 something is missing.
    """
    console = Console(soft_wrap=True, highlight=False)
    bad = 0
    for found in check_line(_load(file), partial(open_any_camera, looking=True), open_trigger, {"http": check_http}):
        mark = "[green]good[/]" if found.good else "[red]bad [/]"
        console.print(f"{mark}  {escape(found.what)}: {escape(found.words)}")
        bad += not found.good
    console.print("everything is there" if not bad else f"{bad} cannot be used")
    raise typer.Exit(2 if bad else 0)


def init_command(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("line.toml"),
    bundle: Annotated[Path | None, typer.Option(help="The bundle's folder.")] = None,
    camera: Annotated[
        str | None, typer.Option(help="Folder of images, or another camera; default: the bundle's samples.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the line.")] = "line-1",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented line.toml that runs at once on a bundle and a folder of images."""
    if file.exists() and not force:
        raise ConfigError(f"{file} already exists.", "", f"saae-line init {file} --force")
    if bundle is None:
        raise ConfigError(
            "A line judges with a bundle.", "--bundle is missing.", "saae-line init --bundle bundles/zipper"
        )
    opened = open_bundle(bundle, verify=False)
    if camera is None:
        camera = str(bundle / "samples")
        if not (opened.path / "samples").is_dir():
            raise ConfigError(f"{bundle} has no sample images.", "", "--camera FOLDER, a folder of images to judge")
    if Path(camera).exists():
        camera = _beside(file, Path(camera))
    write_text(file, example(_beside(file, bundle), camera, name))
    typer.echo(f"{file} written. Next: saae-line check {file} && saae-line run {file}")


def _beside(file: Path, target: Path) -> str:
    """A path as it is written into the file: relative to it if that is shorter."""
    there, here = target.resolve(), file.resolve().parent
    relative = Path(os.path.relpath(there, here))
    return str(there if relative.parts[:3] == ("..", "..", "..") else relative)


def _load(file: Path) -> LineConfig:
    return load_config(file, KINDS, SECTIONS)


def _wait(line: Line, stop: threading.Event) -> None:
    """Wait until it is stopped or at its end; notify the watchdog meanwhile."""
    seconds = watchdog_seconds()
    due = time.monotonic()
    while not stop.is_set() and not line.finished:
        time.sleep(_TICK)  # not stop.wait(): the signal handler sets it on this thread
        if seconds is not None and time.monotonic() >= due and line.health()["live"]:
            notify("WATCHDOG=1")
            due = time.monotonic() + seconds / 3


class _Printer:
    """Prints a line for each part on its own thread, so that a slow reader does not delay a station."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(_PRINTED)
        self._thread = threading.Thread(target=self._print, name="printer", daemon=True)
        self._thread.start()

    def say(self, part: Part) -> None:
        """Queue a part's line; drop it if there is no room."""
        score = "" if part.score is None else f" {part.score:.4g} (limit {part.threshold:.4g})"
        reason = "" if part.reason == "score" else f" {part.reason}"
        with suppress(queue.Full):
            self._lines.put_nowait(f"{part.verdict.value} {part.station} {part.part_id}{score}{reason}\n")

    def finish(self) -> None:
        """Print waiting lines, for a moment at most."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(0.3)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                encoding = sys.stdout.encoding or "utf-8"  # which may lack letters of a part's id
                sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding))
                if self._lines.empty():
                    sys.stdout.flush()
            except (OSError, ValueError):  # nobody reads any more; the records are elsewhere
                return


def _summarize(console: Console, health: dict[str, object]) -> int:
    """Print the summary; return the number of lost records."""
    stations: list[dict[str, object]] = health["stations"]  # type: ignore[assignment]
    sinks: list[dict[str, object]] = health["sinks"]  # type: ignore[assignment]
    spool: dict[str, int] = health["spool"]  # type: ignore[assignment]
    lost = spool["lost"]
    for station in stations:
        counts: dict[str, int] = station["counts"]  # type: ignore[assignment]
        console.print(
            f"{station['name']}: {counts['OK']} OK, {counts['NG']} NG ({counts['timeout']} timed out, "
            f"{counts['error']} could not be judged, {counts['missed']} of them not taken), {counts['dropped']} dropped"
        )
        lost += counts.get("unrecorded", 0)
    for sink in sinks:
        words = f"{sink['name']}: {sink['delivered']} records"
        for key, text in (("backlog", "wait for the next start"), ("lost", "lost"), ("refused", "refused")):
            if sink[key]:
                words += f", {sink[key]} {text}"
        console.print(escape(words))
        lost += int(sink["lost"])  # type: ignore[call-overload]
    return lost


# in the order of the help
app.command("run", cls=LineCommand)(run_command)
app.command("check", cls=LineCommand)(check_command)
app.command("init", cls=LineCommand)(init_command)
app.command("recalibrate", cls=LineCommand)(recalibrate_command)
app.add_typer(audit_app, name="audit")


def main() -> None:
    """Entry point."""
    run(app, "saae-line")


if __name__ == "__main__":
    main()
