"""Outputs of a run: JSON lines, pictures, and lines of text."""

from __future__ import annotations

import ctypes
import io
import math
import os
import select
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from numpy.typing import NDArray
from rich.console import Console

from .. import render
from ..errors import SaaeError
from ..files import encodable, short_name, storage_error
from .scoring import Outcome

__all__ = [
    "PICTURES",
    "Log",
    "Pictures",
    "Standard",
    "describe",
    "printable",
    "printable_lines",
    "results_alone",
    "to_record",
]

PICTURES = ("heatmap", "overlay", "mask", "sheet")
"""Kinds of pictures; each file is named <frame>.<kind>.png."""


class Log(Console):
    """Standard error, for everything except results. If its reader closes it, output is lost and the run goes on.

    (Rich would exit with code 1, which means a defect here.)
    """

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Called by rich after the reader has closed it."""
        self.quiet = True
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stderr.fileno())
            os.close(null)


class Standard:
    """Standard output, only for results; see `results_alone`.

    Args:
        stream: Python's stream.
        number: its file descriptor, written to without a buffer; None for a stream in memory.
    """

    def __init__(self, stream: TextIO, number: int | None = None) -> None:
        self._stream = stream
        self._number = number

    @property
    def is_terminal(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty() if self._number is None else os.isatty(self._number)

    def write_line(self, text: str) -> None:
        """Write a line of text, with escapes for characters that the encoding lacks. Raises as `write`."""
        encoding = self._stream.encoding or "utf-8"
        self.write((text + "\n").encode(encoding, "backslashreplace"))

    def write(self, data: bytes) -> None:
        """Write bytes completely and at once.

        Raises:
            StorageError: a full disk behind `> FILE` or `>> FILE`; what this call wrote of them is cut off again.
            BrokenPipeError: the reader has closed it.
        """
        if self._number is None:
            self._stream.write(data.decode(self._stream.encoding or "utf-8"))
            self._stream.flush()
            return
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._number, rest) :]
                except BlockingIOError:  # a full non-blocking pipe
                    select.select([], [self._number], [])
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):
                _take_back(self._number, len(data) - len(rest))
            raise storage_error(Path("standard output"), error) from error


def _take_back(number: int, count: int) -> None:
    """Cut the last written bytes off a file, if none follow. (`>> FILE` has its position only after a write.)"""
    end = os.lseek(number, 0, os.SEEK_CUR)
    if count and os.fstat(number).st_size == end:
        os.ftruncate(number, end - count)
        os.lseek(number, end - count, os.SEEK_SET)


@contextmanager
def results_alone() -> Iterator[Standard]:
    """Keep standard output for results: all other output to it, also from C libraries, goes to standard error.

    ONNX Runtime's GPU builds print there when they are imported or open a session; `--json -` must begin with JSON.
    """
    stream = sys.stdout
    try:
        number, log = stream.fileno(), sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a stream in memory, or none
        with redirect_stdout(sys.stderr):
            yield Standard(io.StringIO() if stream is None else stream)
        return
    stream.flush()
    kept = os.dup(number)
    os.dup2(log, number)
    try:
        with redirect_stdout(sys.stderr):
            yield Standard(stream, kept)
    finally:
        with suppress(OSError, AttributeError):  # output that C libraries buffer must not follow the results
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, number)
        os.close(kept)


class Pictures:
    """PNG files of results in a folder, laid out like the sources.

    Args:
        folder: the folder; created with the first picture.
        kinds: of `PICTURES`.
        defects_only: whether to skip clean frames.
    """

    def __init__(self, folder: Path, kinds: tuple[str, ...], defects_only: bool = False) -> None:
        self._folder = folder
        self._kinds = kinds
        self._defects_only = defects_only
        # Most of the time of a picture goes into its compression, which needs no interpreter.
        self._writers = ThreadPoolExecutor(len(kinds), "saae-picture")

    def plan(self, outcome: Outcome) -> dict[str, str]:
        """Kind to path of the pictures that `write` will write for this outcome; empty if there is nothing to draw.

        Long names are cut, and get a few letters of a hash.
        """
        frame, result = outcome.frame, outcome.result
        if result is None or frame.image is None or (self._defects_only and not result.is_anomalous):
            return {}
        return {
            kind: str(self._folder / frame.stem.with_name(short_name(frame.stem.name, len(end)) + end))
            for kind in self._kinds
            for end in (f".{kind}.png",)
        }

    def write(self, outcome: Outcome) -> dict[str, str]:
        """Write the pictures of one outcome; return kind to path.

        Raises:
            StorageError: the disk is full, or the folder cannot be written to.
        """
        written = self.plan(outcome)
        saving = [
            self._writers.submit(render.save_png, path, self._draw(kind, outcome)) for kind, path in written.items()
        ]
        wait(saving)
        for done in saving:
            done.result()
        return written

    def _draw(self, kind: str, outcome: Outcome) -> NDArray[Any]:
        frame, result = outcome.frame, outcome.result
        assert result is not None
        assert frame.image is not None
        if kind == "heatmap":
            return result.heatmap()
        if kind == "overlay":
            return result.overlay(frame.image)
        if kind == "mask":
            return result.mask
        title = f"{frame.stem}   {result.reason}"
        return render.sheet(frame.image, result.anomaly_map, result.mask, result.threshold, title=title)


def to_record(outcome: Outcome, pictures: dict[str, str], min_area: int = 1) -> dict[str, Any]:
    """The JSON object of one outcome.

    Keys: `source`, `frame`, then either those of `Result.to_dict` with `ms` and `pictures`, or `error` with `type`,
    `what`, `why` and `try`.
    """
    record: dict[str, Any] = {"source": outcome.frame.name, "frame": outcome.frame.index}
    if outcome.result is None:
        error = outcome.error or SaaeError("The frame was not scored.")
        record["error"] = {
            "type": type(error).__name__,
            "what": error.what,
            "why": error.why,
            "try": error.cure,
        }
        return record
    record.update(outcome.result.to_dict(min_area))
    if outcome.milliseconds is not None and math.isfinite(outcome.milliseconds):
        record["ms"] = round(outcome.milliseconds, 3)
    if pictures:
        record["pictures"] = pictures
    return record


def describe(outcome: Outcome) -> str:
    """The verdict as text: "defect  score 0.512 > 0.4", "clean  score 0.2 <= 0.4", or the error's first line."""
    result = outcome.result
    if result is None:
        return "unreadable" if outcome.error is None else outcome.error.what
    if result.is_anomalous:
        return f"defect  score {result.score:.4g} > {result.image_threshold:.4g}"
    return f"clean  score {result.score:.4g} <= {result.image_threshold:.4g}"


def printable(text: str) -> str:
    """Text that is safe on a terminal: a file name may hold escape codes or bytes that are not UTF-8."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in encodable(text)
    )


def printable_lines(text: str) -> str:
    """`printable`, but keeps line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))
