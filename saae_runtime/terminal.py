"""Output of the commands: errors as panels of what, why and what to type; a clean stop at Ctrl-C; work as stages."""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from .errors import SaaeError
from .version import saae_version

__all__ = [
    "STOPPED",
    "GuardedGroup",
    "LineCommand",
    "Stage",
    "Stages",
    "command_group",
    "error_panel",
    "log",
    "run_command",
]

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""

_DEBUG = "SAAE_DEBUG"


def log() -> Console:
    """The console for everything but results: standard error."""
    return Console(stderr=True, highlight=False)


def error_panel(error: SaaeError) -> Panel:
    """What failed, why, and what to type next."""
    parts: list[RenderableType] = [Text(error.what, style="bold")]
    for name, text in (("why", error.why), ("try", error.cure)):
        if text:
            line = Text(f"{name}: ", style="cyan")
            line.append(text, style="not bold default")
            parts.append(line)
    return Panel(Group(*parts), title=type(error).__name__, title_align="left", border_style="red")


class _Once:
    """Refuses an option with one value that is given twice; by default the last one would win silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(list(args))[2]  # type: ignore[attr-defined]
        if not any(parameter.is_eager for parameter in given):  # --help and --version work with any other option
            seen = set()
            for parameter in given:
                if parameter.name in seen and not getattr(parameter, "multiple", True):
                    raise typer.BadParameter("it is given more than once. Give it once.", ctx=ctx, param=parameter)
                seen.add(parameter.name)
        return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]


class LineCommand(_Once, TyperCommand):
    """A command of saae: options are given once, and the help is wrapped to the terminal's width."""

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        # Typer keeps the line breaks of a docstring within all paragraphs but the first.
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        super().__init__(*args, help="\n\n".join(" ".join(text.split("\n")) for text in paragraphs), **settings)


class GuardedGroup(_Once, TyperGroup):
    """A command group whose commands end in a panel and an exit code instead of a traceback.

    `--debug` in front of the command (or SAAE_DEBUG=1) shows the traceback as well.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SaaeError as error:
            if debug_wanted(ctx):
                traceback.print_exc()
            log().print(error_panel(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if debug_wanted(ctx):
                traceback.print_exc()
            log().print("Stopped. Nothing was left half-written; the same command resumes if it can.")
            raise typer.Exit(STOPPED) from None


def debug_wanted(ctx: Any) -> bool:
    """Whether tracebacks were asked for."""
    return bool(ctx.params.get("debug")) or os.environ.get(_DEBUG, "") not in ("", "0")


def command_group(about: str) -> typer.Typer:
    """A command with sub-commands: guarded, with --version and --debug in front."""
    app = typer.Typer(
        cls=GuardedGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help=about,
    )

    @app.callback()
    def options(
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saae {saae_version()}")
        raise typer.Exit


def run_command(app: typer.Typer, name: str) -> None:
    """Run a console script. SIGTERM stops it as cleanly as Ctrl-C.

    A file name that is not UTF-8 is printed with escapes, as on standard error, instead of ending the command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name=name)


class Stage:
    """One stage in progress. Call it with (done, total); `note` adds text to its closing line."""

    def __init__(self, advance: Callable[[int, int, str], None]) -> None:
        self._advance = advance
        self.notes: list[str] = []

    def __call__(self, done: int, total: int, text: str = "") -> None:
        self._advance(done, total, text)

    def note(self, text: str) -> None:
        """Text for the closing line ("209 images")."""
        self.notes.append(text)


class Stages:
    """Prints stages one after the other to a console (standard error).

    On a terminal a running stage has a bar. In a log file each stage has a line when it starts, one when it ends, and
    one at every tenth of a long stage.

    Args:
        console: where to.
        total: number of stages.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._total = total
        self._number = 0

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(escape(text), style=style or None)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Run the body as the next stage."""
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
        # imported here, because most commands have no bar and should start at once
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

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
