"""The command `saae-run`: images, video or a camera in; verdicts, JSON lines and pictures out."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..appending import Rotation
from ..cluster import connected, shares
from ..engine import Engine
from ..errors import ConfigError, SaaeError
from ..images import PIXELS_VARIABLE
from ..leave import stopped_by_signals
from ..ray_options import OnRay, RayAddress, asked_cluster
from ..sources.files import Source, find_sources
from ..sources.scored import Scored
from ..sources.watch import FolderWatch
from ..terminal import LineCommand
from .checks import (
    check_exports,
    check_outputs,
    check_pattern_outputs,
    check_processes,
    kinds_of,
    outputs_of,
    rotation_of,
)
from .exports import CocoFile, CsvFile, Export, MapTree
from .given import Given, knower, named, watched
from .log import JsonLines
from .outputs import Log, Pictures, Standard, printable, printable_lines, results_alone
from .parquet import ParquetFile
from .pool import Pool, ProcessPool, score_in_pool
from .ray_pool import RayPool
from .scoring import Outcome, score_frames
from .sink import Sink, report
from .summary import say_what_rates_mean, show_progress, summarize, teller

__all__ = ["app", "main"]

BROKEN_PIPE = 141
"""Exit code if the reader of standard output has closed it: 128 + SIGPIPE, as for any program in a pipe."""

VERDICTS_LOST = 4
"""Exit code if verdicts could not be written, for example to a full disk."""

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
        int | None, typer.Option(help="Largest value of 16-bit images, e.g. 4095 for 12 bits; default: the bundle's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames computed together.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Image files only: number of processes, each with its own engine. Default: one; with --ray one for "
            "each GPU, or for each machine.",
            show_default=False,
        ),
    ] = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Include the folders below a folder.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Folders only: also score every image that is added, until Ctrl-C.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for pictures (heatmaps and overlays); or a file X.parquet, X.csv or X.jsonl, then the same as "
            "--parquet, --csv or --json."
        ),
    ] = None,
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Pictures: heatmaps.")] = False,
    overlays: Annotated[bool, typer.Option("--overlays", help="Pictures: overlays with the mask's outline.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Pictures: masks, black and white.")] = False,
    sheets: Annotated[bool, typer.Option("--sheets", help="Pictures: input, heatmap, overlay side by side.")] = False,
    defects_only: Annotated[bool, typer.Option("--defects-only", help="Write pictures of defects only.")] = False,
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
        bool, typer.Option("--overwrite", help="Empty the --json file first and score everything again.")
    ] = False,
    skip_scored: Annotated[
        bool | None,
        typer.Option(
            "--skip-scored/--score-again",
            help="Skip image files (by name, size and time) that earlier runs into the --json file scored; "
            "default: with --watch alone.",
            show_default=False,
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(metavar="SIZE|day", help="Start a new --json file at this size (such as 100MB), or every day."),
    ] = None,
    keep: Annotated[int, typer.Option(min=0, help="Number of old --json files to keep: FILE.1, FILE.2, ...")] = 10,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the largest image that is read; default: 180 million.")
    ] = None,
    min_area: Annotated[int, typer.Option(min=1, help="Leave regions of fewer pixels out of the JSON.")] = 1,
    verify: Annotated[bool, typer.Option(help="First compare the hashes of the bundle's files.")] = True,
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
        asked = (heatmaps, overlays, masks, sheets)
        out, json_lines, csv, parquet = outputs_of(out, json_lines, csv, parquet, any(asked) or defects_only)
        kinds = kinds_of(out, asked, defects_only)
        rotation = rotation_of(rotate, keep, json_lines, overwrite)
        check_outputs(out, json_lines, sources, recursive)
        check_exports(csv, parquet, coco, maps, map_format, sources, recursive, watch and limit is None)
        with ExitStack() as stack:
            standard = stack.enter_context(results_alone())
            if json_lines == "-" and sys.__stdout__ is None:
                raise ConfigError("--json -: standard output is closed.", "", "--json FILE")
            found = None if watch else find_sources(sources, recursive)
            check_pattern_outputs(out, kinds, sources, found or ())
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
                # announced, so that batches are prepared now and not when the first one is full
                "max_batch": batch if batch > 1 else None,
            }
            cluster = asked_cluster(ray, ray_address)
            check_processes(processes, cluster, batch, found)
            engine = stack.enter_context(_open_engine(log, bundle, **options))
            say_what_rates_mean(log, engine, fpr, image_fpr)
            if explain:
                log.print(Text(printable_lines(engine.explain())))
            lines, scored = _open_log(stack, standard, json_lines, overwrite, rotation)
            skip = scored if (watch if skip_scored is None else skip_scored) else None
            given = (
                watched(FolderWatch(sources, recursive, teller(log), knower(skip)))
                if found is None
                else named(found, skip)
            )
            if cluster is not None:
                stack.enter_context(connected(cluster))
            alone = cluster is None and processes in (None, 1)
            pooled = None if alone else _workers(engine, bundle, options, processes, cluster is not None)
            pictures = Pictures(out, kinds, defects_only) if out is not None else None
            bar = stack.enter_context(show_progress(log, given, limit, progress and not quiet))
            exports = _exports(stack, csv, parquet, coco, maps, map_format, engine.manifest.category, min_area)
            sink = Sink(log, standard, lines, scored, pictures, bar, min_area, quiet, exports=exports)
            if watch and not quiet:
                log.print(Text(printable(f"watching {', '.join(sources)}; Ctrl-C ends it")))
            code = _score(engine, given, sink, batch, limit, pooled)
            sink.finish()
            if sink.not_exported and code in (0, 1, 3):
                code = VERDICTS_LOST
            if not quiet:
                summarize(log, sink, engine, backend == "auto", given)
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
    """Entry point. A fault of saae exits with 2, never with 1, which means a defective product."""
    try:
        app(prog_name="saae-run")
    except Exception:
        traceback.print_exc()
        sys.exit(2)


def _open_log(
    stack: ExitStack, standard: Standard, target: str | None, overwrite: bool, rotation: Rotation | None
) -> tuple[JsonLines | None, Scored | None]:
    """The result log and the list of scored files, both closed with the stack."""
    if target is None:
        return None, None
    lines = JsonLines(standard if target == "-" else target, overwrite, rotation)
    stack.callback(lines.close)
    if not lines.plain:
        return lines, None
    scored = Scored(Path(target), forget=overwrite)
    stack.callback(scored.close)
    return lines, scored


def _workers(
    engine: Engine, bundle: Path, options: Mapping[str, Any], processes: int | None, on_cluster: bool
) -> _Scorer:
    """Score files in processes with the backend in use here, sharing the cores of this machine or of the cluster."""
    on_gpu = engine.backend.name.startswith("tensorrt") or engine.backend.name.endswith((":cuda", ":tensorrt"))
    if on_cluster:
        workers, threads = shares(processes, int(on_gpu), options["threads"])
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = processes or 1
        threads = options["threads"] or max(1, cores // workers)
    chosen = {
        **options,
        "backend": engine.backend.name,
        "precision": engine.backend.precision,
        "threads": threads,
        "verify": False,  # this process has compared the hashes
    }
    open_engine = partial(Engine, bundle.resolve(), **chosen)

    def score(sources: Sequence[Source], keep_images: bool, stop: threading.Event) -> Generator[Outcome, None, None]:
        pool: Pool
        if on_cluster:
            pool = RayPool(open_engine, workers, keep_images, cpus=threads, gpus=int(on_gpu))
            sources = [replace(item, path=item.path and item.path.absolute()) for item in sources]
        else:
            pool = ProcessPool(open_engine, workers, keep_images)
        return score_in_pool(pool, sources, stop)

    return score


def _score(
    engine: Engine, given: Given, sink: Sink, batch: int, limit: int | None, pooled: _Scorer | None = None
) -> int:
    """Score everything and return the exit code. Reports errors that end the run."""
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
    """Open the engine; print its warnings as lines for the user, without source lines."""
    tell = teller(log)

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
    """The requested files of other formats; open ones are closed with the stack."""
    exports: list[Export] = []
    if csv is not None:
        table = CsvFile(csv, min_area)
        stack.callback(table.close)
        exports.append(table)
    if parquet is not None:
        rows = ParquetFile(parquet, min_area)
        stack.callback(rows.discard)  # does nothing if it was finished before
        exports.append(rows)
    if coco is not None:
        exports.append(CocoFile(coco, category, min_area))
    if maps is not None:
        exports.append(MapTree(maps, map_format, category))
    return exports


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"saae {version('saae')}")
        raise typer.Exit


if __name__ == "__main__":
    main()
