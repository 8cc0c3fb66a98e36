"""Output of `saae-run` on standard error: warnings, progress, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..engine import Engine
from .given import Given
from .outputs import printable
from .scoring import Summary
from .sink import Sink

__all__ = ["say_what_rates_mean", "show_progress", "summarize", "teller"]


def teller(log: Console) -> Callable[[str], None]:
    """Print a warning."""
    return lambda text: log.print(Text(printable(text), style="yellow"))


def say_what_rates_mean(log: Console, engine: Engine, fpr: float | None, image_fpr: float | None) -> None:
    """Warn about a requested rate below 1/n, which n samples cannot tell from 0."""
    tables = engine.manifest.thresholds[engine.backend.precision]
    for option, rate, table, what in (
        ("--image-fpr", image_fpr, tables.image, "images"),
        ("--fpr", fpr, tables.pixel, "pixels"),
    ):
        if rate is not None and rate > 0 and table.is_too_low(rate):
            log.print(
                Text(
                    f"{option} {rate:g}: the thresholds rest on {table.count} normal {what}, so a rate below "
                    f"1/{table.count} = {1 / table.count:.3g} cannot be told from 0; the threshold for 0 is in force",
                    style="yellow",
                )
            )


@contextmanager
def show_progress(log: Console, given: Given, limit: int | None, wanted: bool) -> Iterator[Callable[[Summary], None]]:
    """A bar on a terminal, from the counts it is called with."""
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


def summarize(log: Console, sink: Sink, engine: Engine, auto: bool, given: Given) -> None:
    """Print what was scored, how fast, and with what."""
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
