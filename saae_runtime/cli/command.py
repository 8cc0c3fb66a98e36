"""The command `saae-run`: images, video or a camera in; verdicts, JSON lines and pictures out."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..engine import Engine
from ..errors import ConfigError, SaaeError
from ..images import IMAGE_SUFFIXES
from ..sources.files import Frame, find_sources, read_frames
from ..sources.video import VIDEO_SUFFIXES
from ..sources.watch import FolderWatch
from ..terminal import LineCommand
from .outputs import (
    PICTURES,
    JsonLines,
    Pictures,
    describe,
    printable,
    printable_lines,
    silence_stdout,
    to_record,
    whole_output,
)
from .scoring import Outcome, Summary, score_frames

__all__ = ["app", "main"]

BROKEN_PIPE = 141
"""Exit code when the reader of standard output goes: 128 + SIGPIPE, as of any program in a pipe."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(cls=LineCommand)
def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Image, folder of images, quoted pattern ('a/**/*.png'), video file, or camera:0.",
            show_default=False,
        ),
    ],
    backend: Annotated[str, typer.Option(help="auto, onnxruntime, onnxruntime:cpu, tensorrt, ...")] = "auto",
    device: Annotated[int, typer.Option(min=0, help="GPU number.")] = 0,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16, int8 or int8-bf16; else the backend's choice.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one inference.")] = None,
    arithmetic: Annotated[
        str | None, typer.Option(help="OpenVINO only: f32, bf16 or f16; default: what the precision was calibrated in.")
    ] = None,
    fpr: Annotated[float | None, typer.Option(help="Acceptable false-positive rate of pixels.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Pixel threshold T itself.")] = None,
    image_fpr: Annotated[float | None, typer.Option(help="Acceptable false-positive rate of images.")] = None,
    image_threshold: Annotated[float | None, typer.Option(help="Image threshold itself.")] = None,
    white_level: Annotated[
        int | None, typer.Option(help="White of 16-bit images, e.g. 4095 for 12 bits; default: the bundle's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames computed together.")] = 1,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Folders below a folder too.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Folders only: go on with every picture that is added, until Ctrl-C.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures (heatmaps and overlays).")] = None,
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Pictures: heatmaps.")] = False,
    overlays: Annotated[bool, typer.Option("--overlays", help="Pictures: overlays with the mask's outline.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Pictures: masks, black and white.")] = False,
    sheets: Annotated[bool, typer.Option("--sheets", help="Pictures: input, heatmap, overlay side by side.")] = False,
    defects_only: Annotated[bool, typer.Option("--defects-only", help="Pictures of defects alone.")] = False,
    json_lines: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="JSON lines, one per frame; - is standard output.")
    ] = None,
    min_area: Annotated[int, typer.Option(min=1, help="Regions of fewer pixels are left out of the JSON.")] = 1,
    verify: Annotated[bool, typer.Option(help="Compare the hashes of the bundle's files first.")] = True,
    explain: Annotated[bool, typer.Option("--explain", help="Say which backends work here, and why not.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line per frame, no progress, no summary.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress on a terminal.")] = True,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda value: _version(value), help="Show the version.")
    ] = False,
) -> None:
    """Score frames with a bundle.

    Results go to standard output; progress, errors and the summary go to standard error, so that
    --json - can be piped. A frame that cannot be read is reported and the rest goes on.

    Exit codes, the first that applies: 130 or 143 stopped by Ctrl-C or SIGTERM (after a clean end, with the summary
    so far), 141 the reader of the pipe has gone, 2 the command, the bundle or the machine is at fault, 1 a defect was
    found, 3 no defect, but frames could not be read, 0 every frame was read and is clean.
    """
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        kinds = _kinds(out, heatmaps, overlays, masks, sheets, defects_only)
        _check_outputs(out, json_lines, sources, recursive)
        given = _given(sources, recursive, watch)
        with ExitStack() as stack:
            engine = _open_engine(
                log,
                bundle,
                backend=backend,
                device=device,
                precision=precision,
                fpr=fpr,
                threshold=threshold,
                image_fpr=image_fpr,
                image_threshold=image_threshold,
                white_level=white_level,
                verify=verify,
                threads=threads,
                arithmetic=arithmetic,
                # Announced, so that what batches need is made now and not when the first one is full.
                max_batch=batch if batch > 1 else None,
            )
            stack.enter_context(engine)
            if explain:
                log.print(Text(printable_lines(engine.explain())))
            pictures = Pictures(out, kinds, defects_only) if out is not None else None
            lines = JsonLines(json_lines) if json_lines is not None else None
            if lines is not None:
                stack.callback(lines.close)
            bar = stack.enter_context(_progress(log, given, limit, progress and not quiet))
            sink = _Sink(log, lines, pictures, bar, min_area, quiet)
            if watch and not quiet:
                log.print(Text(printable(f"watching {', '.join(sources)}; Ctrl-C ends it")))
            code = _score(engine, given, sink, batch, limit)
            if not quiet:
                _summarize(log, sink.summary, engine, backend == "auto", given.live)
    except SaaeError as error:
        _report(log, error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        log.print("Stopped.")
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def main() -> None:
    """Entry point; a defect of saae itself exits with 2, never with the 1 that means a defective product."""
    try:
        app(prog_name="saae-run")
    except Exception:
        traceback.print_exc()
        sys.exit(2)


@dataclass
class _Sink:
    """Where outcomes go, one after the other."""

    log: Console
    lines: JsonLines | None
    pictures: Pictures | None
    progress: Callable[[Summary], None]
    min_area: int
    quiet: bool
    summary: Summary = field(default_factory=Summary)

    def take(self, outcome: Outcome) -> None:
        written = self.pictures.write(outcome) if self.pictures is not None else {}
        if self.lines is not None:
            self.lines.write(to_record(outcome, written, self.min_area))
        if outcome.error is not None:
            _report(self.log, outcome.error)
        elif self.lines is None and not self.quiet:
            _say(self.log, outcome)
        self.summary.add(outcome)
        self.progress(self.summary)


@dataclass(frozen=True)
class _Given:
    """What was named: frames until an event is set, whether they come in real time, and how many there will be."""

    frames: Callable[[threading.Event, int | None], Iterator[Frame]]
    live: bool
    count: Callable[[], int | None]


def _given(names: Sequence[str], recursive: bool, watch: bool) -> _Given:
    if watch:
        return _Given(FolderWatch(names, recursive).frames, live=True, count=lambda: None)
    sources = find_sources(names, recursive)

    def count() -> int | None:
        counts = [source.count() for source in sources]
        return sum(number for number in counts if number is not None) if None not in counts else None

    return _Given(
        lambda stop, white_level: read_frames(sources, white_level), any(source.live for source in sources), count
    )


def _score(engine: Engine, given: _Given, sink: _Sink, batch: int, limit: int | None) -> int:
    """Runs everything through; returns the exit code. Errors that end the run are reported here."""
    stop = threading.Event()
    failed: int | None = None
    with _stop_on_signals(stop) as stopped_by:
        outcomes = score_frames(engine, given.frames(stop, engine.white_level), batch=batch, live=given.live, stop=stop)
        try:
            for taken, outcome in enumerate(outcomes, start=1):
                sink.take(outcome)
                if taken == limit:
                    break
        except BrokenPipeError:
            failed = BROKEN_PIPE
            silence_stdout()
        except SaaeError as error:
            failed = error.exit_code
            _report(sink.log, error)
        finally:
            outcomes.close()
    if stopped_by:
        return 128 + stopped_by[0]
    return sink.summary.exit_code if failed is None else failed


def _open_engine(log: Console, bundle: Path, **options: Any) -> Engine:
    # `auto` warns about what it passes over; here that is a line for the reader, not a line of source code.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = Engine(bundle, **options)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            log.print(Text(printable(str(warning.message)), style="yellow"))
    return engine


def _kinds(
    out: Path | None, heatmaps: bool, overlays: bool, masks: bool, sheets: bool, defects_only: bool
) -> tuple[str, ...]:
    wanted = (heatmaps, overlays, masks, sheets)
    chosen = tuple(kind for kind, asked in zip(PICTURES, wanted, strict=True) if asked)
    if out is None and (chosen or defects_only):
        raise ConfigError("Pictures need a folder.", "--out is missing.", "add --out DIR")
    return chosen or ("heatmap", "overlay")


def _check_outputs(out: Path | None, json_lines: str | None, sources: Sequence[str], recursive: bool) -> None:
    """Refuses outputs that would overwrite the input or be scored as input the next time."""
    if json_lines not in (None, "-"):
        target = Path(str(json_lines))
        if target.is_dir() or target.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise ConfigError(
                f"--json {target}: this is no place for JSON lines.",
                "It is a folder." if target.is_dir() else "By its name it is an image or a video.",
                "--json results.jsonl, or --json - for standard output",
            )
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: not a folder.", "A file of this name is there.", "choose another folder")
    for name in sources:
        folder = Path(name)
        if not folder.is_dir():
            continue
        place, source = out.resolve(), folder.resolve()
        if place == source or (recursive and source in place.parents):
            raise ConfigError(
                f"--out {out} lies in the source {folder}.",
                "The next run would score the pictures as if they were frames.",
                "choose a folder outside of the source",
            )


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[list[int]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop, so that no line or file is cut; a second one breaks."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        stop.set()

    before = {}
    # Only the main thread may set handlers; elsewhere (embedded use) signals are the host's business.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(log: Console, given: _Given, limit: int | None, wanted: bool) -> Iterator[Callable[[Summary], None]]:
    if not (wanted and log.is_terminal):
        yield lambda summary: None
        return
    total = given.count()
    if limit is not None:
        total = limit if total is None else min(limit, total)
    bar = Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=log,
        transient=True,
        # Redirected output would move the results on standard output to standard error.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("", total=total, note="")

        def update(summary: Summary) -> None:
            note = f"{summary.defects} defective  {summary.frames_per_second:.1f} frames/s"
            bar.update(task, completed=summary.scored + summary.errors, note=note)

        yield update


def _say(log: Console, outcome: Outcome) -> None:
    """One line of standard output for a scored frame."""
    frame = outcome.frame
    name = frame.source.name if frame.source.kind == "image" else f"{frame.source.name} #{frame.index}"
    line = printable(f"{describe(outcome)}  {name}")
    if sys.stdout.isatty() and log.is_terminal:
        # Both are the same terminal: the bar must move aside.
        log.print(Text(line, style="bold red" if outcome.result and outcome.result.is_anomalous else ""))
        return
    encoding = sys.stdout.encoding or "utf-8"
    with whole_output():
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()


def _report(log: Console, error: SaaeError) -> None:
    text = Text("error: ", style="bold red")
    text.append(printable_lines(str(error)), style="not bold default")
    log.print(text)


def _summarize(log: Console, summary: Summary, engine: Engine, auto: bool, live: bool) -> None:
    clean = summary.scored - summary.defects
    total = summary.scored + summary.errors
    log.print(
        f"{total} frame{'' if total == 1 else 's'}: {clean} clean, {summary.defects} defective, "
        f"{summary.errors} unreadable"
    )
    median, tail = summary.milliseconds(0.5), summary.milliseconds(0.95)
    if median is not None and tail is not None:
        inside = (
            "frame to result: resize, inference, map and mask at the frame's size"
            if live
            else "reading, resize, inference, map and mask at the frame's size, writing; overlapped"
        )
        log.print(
            f"{summary.frames_per_second:.1f} frames/s in {summary.seconds:.1f} s of wall clock; "
            f"per frame median {median:.1f} ms, p95 {tail:.1f} ms ({inside})"
        )
    log.print(f"image threshold {engine.image_threshold:.4g}, pixel threshold T {engine.threshold:.4g}")
    why = "auto: the fastest that works here, --explain says why the others do not" if auto else "as asked"
    log.print(Text(printable(f"{engine.backend.name} ({why}): {engine.backend.description}")))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"saae {version('saae')}")
        raise typer.Exit


if __name__ == "__main__":
    main()
