"""A long command as named stages on the terminal: what is running, how far it is, how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

__all__ = ["Stage", "Stages"]


class Stage:
    """One stage in progress. Call it with (done, total); `note` adds words to its closing line."""

    def __init__(self, advance: Callable[[int, int, str], None]) -> None:
        self._advance = advance
        self.notes: list[str] = []

    def __call__(self, done: int, total: int, text: str = "") -> None:
        self._advance(done, total, text)

    def note(self, text: str) -> None:
        """Words for the closing line ("209 images")."""
        self.notes.append(text)


class Stages:
    """Prints stages one after the other to a console (standard error).

    On a terminal a running stage has a bar; in a log file each stage is one line when it starts and one when it ends,
    and every tenth of a long one in between, so that a log shows that something moves.

    Args:
        console: where to.
        total: number of stages.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._total = total
        self._number = 0

    def say(self, text: str, style: str = "") -> None:
        """One line of its own."""
        self.console.print(escape(text), style=style or None)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Runs the body as the next stage."""
        self._number += 1
        head = f"{self._number}/{self._total} {title}"
        began = time.monotonic()
        if self.console.is_terminal:
            with self._bar(head) as stage:
                yield stage
        else:
            self.console.print(escape(f"{head} ..."))
            stage = Stage(_tenths(self.console, title))
            yield stage
        seconds = time.monotonic() - began
        notes = f": {', '.join(stage.notes)}" if stage.notes else ""
        self.console.print(f"[green]{escape(head)}[/green]{escape(notes)} [dim]({_duration(seconds)})[/dim]")

    @contextmanager
    def _bar(self, head: str) -> Iterator[Stage]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(escape(head), total=None, text="")

            def advance(done: int, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, text=escape(text))

            yield Stage(advance)


def _tenths(console: Console, title: str) -> Callable[[int, int, str], None]:
    """A line at every tenth of a count; a stage may count several things one after the other (images, then steps)."""
    seen: list[tuple[int, int]] = [(0, 0)]

    def advance(done: int, total: int, text: str) -> None:
        tenth = 10 * done // max(total, 1)
        before_total, before = seen[0]
        if total != before_total:
            before = 0
        seen[0] = (total, max(before, tenth))
        if before < tenth < 10:
            console.print(escape(f"  {title} {done}/{total} {text}".rstrip()))

    return advance


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
