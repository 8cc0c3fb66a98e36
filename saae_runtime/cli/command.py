"""The command `saae-run`: images, video or a camera in; verdicts, JSON lines and pictures out."""

from __future__ import annotations

import glob
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..appending import Rotation
from ..engine import Engine
from ..errors import ConfigError, SaaeError
from ..images import IMAGE_SUFFIXES, PIXELS_VARIABLE
from ..leave import stopped_by_signals
from ..sources.files import Facts, Frame, Source, facts_of, find_sources, read_frames
from ..sources.folders import pattern_takes
from ..sources.scored import Scored
from ..sources.video import VIDEO_SUFFIXES
from ..sources.watch import FolderWatch
from ..terminal import LineCommand
from .exports import MAP_FORMATS, CocoFile, CsvFile, Export, MapTree, ParquetFile
from .log import JsonLines
from .outputs import PICTURES, Log, Pictures, Standard, printable, printable_lines, results_alone
from .pool import Pool, ProcessPool, score_in_pool
from .ray_pool import RayPool, connected
from .scoring import Outcome, Summary, score_frames
from .sink import Sink, report

__all__ = ["app", "main"]

BROKEN_PIPE = 141
"""Exit code when the reader of standard output goes: 128 + SIGPIPE, as of any program in a pipe."""

VERDICTS_LOST = 4
"""Exit code when verdicts could not be written where they were to go: the disk was full, for example."""

_Scorer = Callable[[Sequence[Source], bool, threading.Event], Generator[Outcome, None, None]]

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
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Whether auto times the backends once on this machine; default: yes, unless SAAE_MEASURE=0.",
            show_default=False,
        ),
    ] = None,
    fpr: Annotated[float | None, typer.Option(help="Acceptable false-positive rate of pixels.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Pixel threshold T itself.")] = None,
    image_fpr: Annotated[float | None, typer.Option(help="Acceptable false-positive rate of images.")] = None,
    image_threshold: Annotated[float | None, typer.Option(help="Image threshold itself.")] = None,
    white_level: Annotated[
        int | None, typer.Option(help="White of 16-bit images, e.g. 4095 for 12 bits; default: the bundle's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames computed together.")] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="Image files only: score in so many processes, each with its own engine.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Have the processes on a Ray cluster: auto, local or HOST:PORT."),
    ] = None,
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
        str | None,
        typer.Option("--json", metavar="FILE", help="JSON lines, one per frame, appended; - is standard output."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="CSV, one line per frame, appended.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="Parquet, one row per frame, when the run ends.")
    ] = None,
    coco: Annotated[
        Path | None, typer.Option("--coco", metavar="FILE", help="COCO data set with the regions, when the run ends.")
    ] = None,
    maps: Annotated[Path | None, typer.Option("--maps", metavar="DIR", help="Anomaly maps as TIFF.")] = None,
    map_format: Annotated[
        str, typer.Option(help="tiff (like the sources), mvtec (MVTec AD, LOCO) or mvtec-ad-2 (its server).")
    ] = "tiff",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Empty the --json file first, score all again.")
    ] = False,
    skip_scored: Annotated[
        bool | None,
        typer.Option(
            "--skip-scored/--score-again",
            help="Pass over image files (by name, size and time) that the --json file's runs scored; "
            "default: with --watch alone.",
            show_default=False,
        ),
    ] = None,
    rotate: Annotated[
        str | None, typer.Option(metavar="SIZE|day", help="Begin a new --json file at 100MB, say, or every day.")
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="So many old --json files stay: FILE.1, FILE.2, ...")] = 10,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the largest image that is read; default: 180 million.")
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
    so far), 141 the reader of the pipe has gone, 2 the command, the bundle or the machine is at fault, 4 verdicts could
    not be written (disk full), 1 a defect was found, 3 no defect, but frames could not be read, 0 every frame was read
    and is clean.
    """
    log = Log()
    try:
        if max_pixels is not None:
            os.environ[PIXELS_VARIABLE] = str(max_pixels)
        kinds = _kinds(out, heatmaps, overlays, masks, sheets, defects_only)
        rotation = _rotation(rotate, keep, json_lines, overwrite)
        _check_outputs(out, json_lines, sources, recursive)
        _check_exports(csv, parquet, coco, maps, map_format, sources, recursive, watch and limit is None)
        with ExitStack() as stack:
            standard = stack.enter_context(results_alone())
            if json_lines == "-" and sys.__stdout__ is None:
                raise ConfigError("--json -: standard output is closed.", "", "--json FILE")
            found = None if watch else find_sources(sources, recursive)
            _check_pattern_outputs(out, kinds, sources, found or ())
            options: dict[str, Any] = {
                "backend": backend,
                "device": device,
                "precision": precision,
                "fpr": fpr,
                "threshold": threshold,
                "image_fpr": image_fpr,
                "image_threshold": image_threshold,
                "white_level": white_level,
                "verify": verify,
                "threads": threads,
                "arithmetic": arithmetic,
                "measure": measure,
                # Announced, so that what batches need is made now and not when the first one is full.
                "max_batch": batch if batch > 1 else None,
            }
            _check_processes(processes, ray, batch, found)
            engine = stack.enter_context(_open_engine(log, bundle, **options))
            _say_what_rates_mean(log, engine, fpr, image_fpr)
            if explain:
                log.print(Text(printable_lines(engine.explain())))
            lines, scored = _open_log(stack, standard, json_lines, overwrite, rotation)
            skip = scored if (watch if skip_scored is None else skip_scored) else None
            given = (
                _watched(log, FolderWatch(sources, recursive, _teller(log), _knower(skip)), quiet)
                if found is None
                else _named(log, found, skip, quiet)
            )
            if ray is not None:
                stack.enter_context(connected(ray))
            pooled = _workers(engine, bundle, options, processes, ray) if processes > 1 or ray is not None else None
            pictures = Pictures(out, kinds, defects_only) if out is not None else None
            bar = stack.enter_context(_progress(log, given, limit, progress and not quiet))
            exports = _exports(stack, csv, parquet, coco, maps, map_format, engine.manifest.category, min_area)
            sink = Sink(log, standard, lines, scored, pictures, bar, min_area, quiet, exports=exports)
            if watch and not quiet:
                log.print(Text(printable(f"watching {', '.join(sources)}; Ctrl-C ends it")))
            code = _score(engine, given, sink, batch, limit, pooled)
            sink.finish()
            if sink.not_exported and code in (0, 1, 3):
                code = VERDICTS_LOST
            if not quiet:
                _summarize(log, sink, engine, backend == "auto", given)
    except SaaeError as error:
        report(log, error)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(BROKEN_PIPE) from None
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


def _rotation(rotate: str | None, keep: int, json_lines: str | None, overwrite: bool) -> Rotation | None:
    if json_lines in (None, "-"):
        for name, given in (("--rotate", rotate is not None), ("--overwrite", overwrite)):
            if given:
                raise ConfigError(f"{name} is about a file of results.", "--json names none.", "add --json FILE")
    return None if rotate is None else Rotation.parse(rotate, keep)


def _open_log(
    stack: ExitStack, standard: Standard, target: str | None, overwrite: bool, rotation: Rotation | None
) -> tuple[JsonLines | None, Scored | None]:
    """The result log and what it has scored so far, both closed with the stack."""
    if target is None:
        return None, None
    lines = JsonLines(standard if target == "-" else target, overwrite, rotation)
    stack.callback(lines.close)
    if not lines.plain:
        return lines, None
    scored = Scored(Path(target), forget=overwrite)
    stack.callback(scored.close)
    return lines, scored


@dataclass(frozen=True)
class _Given:
    """What was named: frames until an event is set, whether they come in real time, how many there will be, and words
    for the summary."""

    frames: Callable[[threading.Event, int | None], Iterator[Frame]]
    live: bool
    count: Callable[[], int | None]
    words: Callable[[], list[str]] = list
    sources: Sequence[Source] = ()
    nothing_new: bool = False  # all that was named was scored by an earlier run


def _watched(log: Console, watcher: FolderWatch, quiet: bool) -> _Given:
    def words() -> list[str]:
        said = []
        if watcher.outages:
            times = "once" if watcher.outages == 1 else f"{watcher.outages} times"
            said.append(f"a watched folder was away {times}, for {watcher.away:.0f} s in all")
        if watcher.passed_over:
            said.append(_passed_over(watcher.passed_over))
        return said

    return _Given(watcher.frames, live=True, count=lambda: None, words=words)


def _named(log: Console, sources: Sequence[Source], skip: Scored | None, quiet: bool) -> _Given:
    left = [source for source in sources if not _is_scored(source, skip)]
    passed_over = len(sources) - len(left)

    def count() -> int | None:
        counts = [source.count() for source in left]
        return sum(number for number in counts if number is not None) if None not in counts else None

    return _Given(
        lambda stop, white_level: read_frames(left, white_level),
        any(source.live for source in left),
        count,
        lambda: [_passed_over(passed_over)] if passed_over else [],
        left,
        nothing_new=passed_over > 0 and not left,
    )


def _passed_over(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'} passed over: scored by an earlier run (--score-again scores them)"


def _is_scored(source: Source, scored: Scored | None) -> bool:
    if scored is None or source.kind != "image" or source.path is None:
        return False
    return scored.knows(str(source.path.absolute()), facts_of(source.path))


def _knower(scored: Scored | None) -> Callable[[str, Facts], bool]:
    return (lambda path, facts: False) if scored is None else scored.knows


def _teller(log: Console) -> Callable[[str], None]:
    return lambda text: log.print(Text(printable(text), style="yellow"))


def _say_what_rates_mean(log: Console, engine: Engine, fpr: float | None, image_fpr: float | None) -> None:
    """A rate below 1/n cannot be told from 0 with n samples: said where such a rate is asked for."""
    tables = engine.manifest.thresholds[engine.backend.precision]
    for option, rate, table, what in (
        ("--image-fpr", image_fpr, tables.image, "images"),
        ("--fpr", fpr, tables.pixel, "pixels"),
    ):
        if rate is not None and 0 < rate * table.count < 1 - 1e-9:
            log.print(
                Text(
                    f"{option} {rate:g}: the thresholds rest on {table.count} normal {what}, so a rate below "
                    f"1/{table.count} = {1 / table.count:.3g} cannot be told from 0; the threshold for 0 is in force",
                    style="yellow",
                )
            )


def _check_processes(processes: int, ray: str | None, batch: int, sources: Sequence[Source] | None) -> None:
    if processes == 1 and ray is None:
        return
    if sources is None or any(source.kind != "image" for source in sources):
        raise ConfigError(
            "--processes is for image files.", "A folder that is watched, a video and a camera have one reader.", ""
        )
    if batch > 1:
        raise ConfigError(
            "--processes and --batch do not go together.", "Each process scores file by file.", "one of them"
        )


def _workers(engine: Engine, bundle: Path, options: Mapping[str, Any], processes: int, ray: str | None) -> _Scorer:
    """Scores files in processes: the backend that is in use here, and this machine's cores shared among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = {
        **options,
        "backend": engine.backend.name,
        "precision": engine.backend.precision,
        "threads": options["threads"] or max(1, cores // processes),
        "verify": False,  # this process has compared the hashes
    }
    open_engine = partial(Engine, bundle.resolve(), **chosen)
    on_gpu = engine.backend.name.startswith("tensorrt") or engine.backend.name.endswith((":cuda", ":tensorrt"))

    def score(sources: Sequence[Source], keep_images: bool, stop: threading.Event) -> Generator[Outcome, None, None]:
        pool: Pool
        if ray is None:
            pool = ProcessPool(open_engine, processes, keep_images)
        else:
            pool = RayPool(open_engine, processes, keep_images, cpus=int(chosen["threads"]), gpus=int(on_gpu))
            sources = [replace(item, path=item.path and item.path.absolute()) for item in sources]
        return score_in_pool(pool, sources, stop)

    return score


def _score(
    engine: Engine, given: _Given, sink: Sink, batch: int, limit: int | None, pooled: _Scorer | None = None
) -> int:
    """Runs everything through; returns the exit code. Errors that end the run are reported here."""
    stop = threading.Event()
    failed: int | None = None
    with stopped_by_signals(stop) as stopped_by:
        if pooled is not None:
            outcomes = pooled(given.sources, sink.pictures is not None, stop)
        else:
            frames = given.frames(stop, engine.white_level)
            outcomes = score_frames(engine, frames, batch=batch, live=given.live, stop=stop)
        try:
            for taken, outcome in enumerate(outcomes, start=1):
                sink.take(outcome)
                if taken == limit:
                    break
        except BrokenPipeError:
            failed = BROKEN_PIPE
        except SaaeError as error:
            failed = error.exit_code
            report(sink.log, error)
        finally:
            outcomes.close()
    if stopped_by:
        return 128 + stopped_by[0]
    if failed is not None:
        return failed
    if given.nothing_new:
        return 0
    return VERDICTS_LOST if sink.lost else sink.summary.exit_code


def _open_engine(log: Console, bundle: Path, **options: Any) -> Engine:
    """The engine; what it says meanwhile are lines for the reader, said at once, not lines of source code."""
    tell = _teller(log)

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    def warned(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            tell(str(message))

    logger, handler = logging.getLogger("saae_runtime"), Told()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        logger.addHandler(handler)
        try:
            return Engine(bundle, **options)
        finally:
            logger.removeHandler(handler)


def _kinds(
    out: Path | None, heatmaps: bool, overlays: bool, masks: bool, sheets: bool, defects_only: bool
) -> tuple[str, ...]:
    wanted = (heatmaps, overlays, masks, sheets)
    chosen = tuple(kind for kind, asked in zip(PICTURES, wanted, strict=True) if asked)
    if out is None and (chosen or defects_only):
        raise ConfigError("Pictures need a folder.", "--out is missing.", "add --out DIR")
    return chosen or ("heatmap", "overlay")


def _check_outputs(
    out: Path | None, json_lines: str | None, sources: Sequence[str], recursive: bool, option: str = "--out"
) -> None:
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
        raise ConfigError(f"{option} {out}: not a folder.", "A file of this name is there.", "choose another folder")
    for name in sources:
        folder = Path(name)
        if not folder.is_dir():
            continue
        place, source = out.resolve(), folder.resolve()
        if place == source or (recursive and source in place.parents):
            raise ConfigError(
                f"{option} {out} lies in the source {folder}.",
                "The next run would score what is written there as if it were frames.",
                "choose a folder outside of the source",
            )


def _check_exports(
    csv: Path | None,
    parquet: Path | None,
    coco: Path | None,
    maps: Path | None,
    map_format: str,
    sources: Sequence[str],
    recursive: bool,
    endless: bool,
) -> None:
    """Refuses names that are not of files of these formats, and a run without end for what is written at its end."""
    for option, target, suffix in (
        ("--csv", csv, ".csv"),
        ("--parquet", parquet, ".parquet"),
        ("--coco", coco, ".json"),
    ):
        if target is not None and (target.is_dir() or target.suffix.lower() != suffix):
            raise ConfigError(f"{option} {target}: not the name of such a file.", "", f"{option} results{suffix}")
    for option, target in (("--coco", coco), ("--parquet", parquet)):
        if target is not None and endless:
            raise ConfigError(
                f"{option} is written when the run ends.", "--watch does not end.", "--csv, --json or --limit"
            )
    if map_format not in MAP_FORMATS:
        raise ConfigError(f"--map-format {map_format} is not known.", "", f"one of: {', '.join(MAP_FORMATS)}")
    if maps is None and map_format != "tiff":
        raise ConfigError("--map-format is about anomaly maps.", "--maps is missing.", "add --maps DIR")
    _check_outputs(maps, None, sources, recursive, "--maps")


def _exports(
    stack: ExitStack,
    csv: Path | None,
    parquet: Path | None,
    coco: Path | None,
    maps: Path | None,
    map_format: str,
    category: str,
    min_area: int,
) -> list[Export]:
    """The files of other formats that were asked for; those that are open are closed with the stack."""
    exports: list[Export] = []
    if csv is not None:
        table = CsvFile(csv, min_area)
        stack.callback(table.close)
        exports.append(table)
    if parquet is not None:
        rows = ParquetFile(parquet, min_area)
        stack.callback(rows.discard)  # nothing where it was finished before
        exports.append(rows)
    if coco is not None:
        exports.append(CocoFile(coco, category, min_area))
    if maps is not None:
        exports.append(MapTree(maps, map_format, category))
    return exports


def _check_pattern_outputs(
    out: Path | None, kinds: Sequence[str], names: Sequence[str], sources: Sequence[Source]
) -> None:
    """Refuses a folder for pictures whose pictures a source pattern would match the next time."""
    patterns = [name for name in names if glob.has_magic(name) and not Path(name).exists()]
    if out is None or not patterns:
        return
    for source in sources:
        stem = source.stem if source.kind == "image" else source.stem / "000000"
        for kind in kinds:
            picture = out / stem.with_name(f"{stem.name}.{kind}.png")
            for pattern in patterns:
                if pattern_takes(pattern, picture):
                    raise ConfigError(
                        f"--out {out} lies within the source pattern {pattern}.",
                        f"The next run would score {picture} as if it were a frame.",
                        "choose a folder outside of the pattern",
                    )


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


def _summarize(log: Console, sink: Sink, engine: Engine, auto: bool, given: _Given) -> None:
    summary, live = sink.summary, given.live
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
    for words in (*sink.words(), *given.words()):
        log.print(Text(printable(words), style="yellow"))
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
