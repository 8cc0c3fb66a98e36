"""Writes outcomes one after the other: first the verdict, then pictures if there is room."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from ..errors import SaaeError, StorageError
from ..sources.scored import Scored
from .exports import Export
from .log import JsonLines
from .outputs import Pictures, Standard, describe, printable, printable_lines, to_record
from .scoring import Outcome, Summary

__all__ = ["Sink", "report"]

_PAUSE = 10.0  # seconds without pictures after a failed write


@dataclass
class Sink:
    """Writes outcomes.

    Verdicts and pictures fail independently, and neither ends the run: a failure is reported once, writing is tried
    again, and lost ones are counted.

    Attributes:
        lost: verdicts that could not be written.
        left_out: pictures that could not be written.
        not_exported: results that could not be written in another format.
    """

    log: Console
    standard: Standard
    lines: JsonLines | None
    scored: Scored | None
    pictures: Pictures | None
    progress: Callable[[Summary], None]
    min_area: int
    quiet: bool
    summary: Summary = field(default_factory=Summary)
    lost: int = 0
    left_out: int = 0
    exports: Sequence[Export] = ()
    not_exported: int = 0
    _pause: float = 0.0  # no pictures before this time
    _said: set[str] = field(default_factory=set)

    def take(self, outcome: Outcome) -> None:
        """Write an outcome.

        Raises:
            BrokenPipeError: the reader of standard output has closed it.
        """
        planned = self.pictures.plan(outcome) if self.pictures is not None else {}
        pausing = bool(planned) and time.monotonic() < self._pause
        self._write_verdict(outcome, {} if pausing else planned)
        if outcome.error is not None:
            report(self.log, outcome.error)
        self.summary.add(outcome)
        if pausing:
            self.left_out += len(planned)
        elif self.pictures is not None and planned:
            self._write_pictures(self.pictures, outcome, len(planned))
        for export in self.exports:
            self._export(1, export.write, outcome)
        self.progress(self.summary)

    def finish(self) -> None:
        """Finish the files of other formats."""
        for export in self.exports:
            self._export(max(export.unfinished, 1), export.close)

    def words(self) -> list[str]:
        """Text for the summary about lost outputs."""
        said = []
        if self.lost:
            said.append(f"{self.lost} verdict{'' if self.lost == 1 else 's'} could not be written")
        if self.left_out:
            said.append(f"{self.left_out} picture{'' if self.left_out == 1 else 's'} left out")
        if self.not_exported:
            said.append(f"{self.not_exported} result{'' if self.not_exported == 1 else 's'} not exported")
        return said

    def _write_verdict(self, outcome: Outcome, pictures: dict[str, str]) -> None:
        try:
            if self.lines is not None:
                self.lines.write(to_record(outcome, pictures, self.min_area))
            elif outcome.error is None and not self.quiet:
                self._say(outcome)
        except StorageError as error:
            self.lost += 1
            self._once("verdicts", error, "The run goes on judging; verdicts that cannot be written are counted.")
            if self.lines is not None and self.lines.plain and outcome.error is None:
                with suppress(StorageError):
                    self._say(outcome)  # still shown to the reader of standard output
            return
        frame = outcome.frame
        if self.scored is None or frame.facts is None or frame.source.path is None:
            return
        try:
            self.scored.add(str(frame.source.path.absolute()), frame.facts)
        except StorageError as error:
            self._once("scored", error, "The next run may score some files again.")

    def _write_pictures(self, pictures: Pictures, outcome: Outcome, count: int) -> None:
        try:
            pictures.write(outcome)
        except (StorageError, MemoryError) as error:
            self.left_out += count
            self._pause = time.monotonic() + _PAUSE
            known = error if isinstance(error, SaaeError) else SaaeError("There is not enough memory for pictures.")
            self._once("pictures", known, "Verdicts go on; pictures are tried again every 10 s, and counted.")

    def _export(self, count: int, write: Callable[..., None], *outcome: Outcome) -> None:
        try:
            write(*outcome)
        except (StorageError, MemoryError) as error:
            self.not_exported += count
            known = (
                error if isinstance(error, SaaeError) else SaaeError("There is not enough memory to export a result.")
            )
            self._once("exports", known, "Verdicts go on; results that are not exported are counted.")

    def _once(self, kind: str, error: SaaeError, then: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            report(self.log, error)
            self.log.print(Text(then, style="yellow"))

    def _say(self, outcome: Outcome) -> None:
        """Print a line on standard output for a scored frame."""
        frame = outcome.frame
        name = frame.name if frame.source.kind == "image" else f"{frame.name} #{frame.index}"
        line = printable(f"{describe(outcome)}  {name}")
        if self.standard.is_terminal and self.log.is_terminal:
            # Both are the same terminal: the bar must move aside.
            self.log.print(Text(line, style="bold red" if outcome.result and outcome.result.is_anomalous else ""))
            return
        self.standard.write_line(line)


def report(log: Console, error: SaaeError) -> None:
    """Print an error of several lines."""
    text = Text("error: ", style="bold red")
    text.append(printable_lines(str(error)), style="not bold default")
    log.print(text)
