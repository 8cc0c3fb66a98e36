"""What a run leaves behind: JSON lines, pictures, and lines of text for a person."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from .. import render
from ..errors import SaaeError
from ..files import storage_error
from .scoring import Outcome

__all__ = [
    "PICTURES",
    "JsonLines",
    "Pictures",
    "describe",
    "printable",
    "printable_lines",
    "silence_stdout",
    "to_record",
    "whole_output",
]

PICTURES = ("heatmap", "overlay", "mask", "sheet")
"""Kinds of pictures; each file is named <frame>.<kind>.png."""


def silence_stdout() -> None:
    """Points standard output nowhere, so that the interpreter's last flush does not complain about it."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def whole_output() -> Iterator[None]:
    """Around writes to standard output: a full disk behind `> FILE` is a StorageError like any other.

    Raises:
        StorageError: the write failed.
        BrokenPipeError: whoever read it has gone.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise storage_error(Path("standard output"), error) from error


class JsonLines:
    """One JSON object per line, each written whole: a reader of the file or pipe never sees half a line.

    Args:
        target: a file (replaced, folders made), or "-" for standard output.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, target: str) -> None:
        self._path = None if target == "-" else Path(target)
        self._file: IO[bytes] | None = None
        self._end = 0
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("wb", buffering=0)
            except OSError as error:
                raise storage_error(self._path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        """Writes one line and hands it to the system at once.

        Raises:
            StorageError: the disk is full; the lines before this one stay whole.
            BrokenPipeError: whoever read standard output has gone.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode("ascii")
        if self._file is None or self._path is None:
            with whole_output():
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            return
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._end += len(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):  # a device or pipe cannot be cut
                self._file.truncate(self._end)
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            self._file.close()


class Pictures:
    """PNG files of results in a folder, laid out like the sources.

    Args:
        folder: where they go; made when the first picture is written.
        kinds: of `PICTURES`.
        defects_only: whether clean frames are passed over.
    """

    def __init__(self, folder: Path, kinds: tuple[str, ...], defects_only: bool = False) -> None:
        self._folder = folder
        self._kinds = kinds
        self._defects_only = defects_only

    def write(self, outcome: Outcome) -> dict[str, str]:
        """Writes the pictures of one outcome; returns kind to path, empty where there is nothing to draw.

        Raises:
            StorageError: the disk is full, or the folder cannot be written to.
        """
        frame, result = outcome.frame, outcome.result
        if result is None or frame.image is None or (self._defects_only and not result.is_anomalous):
            return {}
        written = {}
        for kind in self._kinds:
            picture: NDArray[Any]
            if kind == "heatmap":
                picture = result.heatmap()
            elif kind == "overlay":
                picture = result.overlay(frame.image)
            elif kind == "mask":
                picture = result.mask
            else:
                title = f"{frame.stem}   {describe(outcome)}"
                picture = render.sheet(frame.image, result.anomaly_map, result.mask, result.threshold, title=title)
            path = self._folder / frame.stem.with_name(f"{frame.stem.name}.{kind}.png")
            render.save_png(path, picture)
            written[kind] = str(path)
        return written


def to_record(outcome: Outcome, pictures: dict[str, str], min_area: int = 1) -> dict[str, Any]:
    """The JSON object of one outcome.

    Keys: `source`, `frame`, then either those of `Result.to_dict` with `ms` and `pictures`, or `error` with `type`,
    `what`, `why` and `try`.
    """
    record: dict[str, Any] = {"source": outcome.frame.source.name, "frame": outcome.frame.index}
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
    """The verdict in words: "defect  score 0.512 > 0.4", "clean  score 0.2 <= 0.4", or the error's first line."""
    result = outcome.result
    if result is None:
        return "unreadable" if outcome.error is None else outcome.error.what
    if result.is_anomalous:
        return f"defect  score {result.score:.4g} > {result.image_threshold:.4g}"
    return f"clean  score {result.score:.4g} <= {result.image_threshold:.4g}"


def printable(text: str) -> str:
    """Text that a terminal shows as it is: a file name may hold escape codes or bytes that are no UTF-8."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in whole)


def printable_lines(text: str) -> str:
    """`printable`, with the line breaks kept."""
    return "\n".join(printable(line) for line in text.split("\n"))
