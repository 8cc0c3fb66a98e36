"""Writes records as lines of a file: JSON, or CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...appending import LineFile, Rotation
from ...errors import ConfigError
from ...files import encodable
from ..spool_records import Record
from .base import Hurry

__all__ = ["COLUMNS", "CsvOptions", "CsvSink", "JsonlOptions", "JsonlSink"]

COLUMNS = (
    "time",
    "station",
    "part_id",
    "verdict",
    "reason",
    "score",
    "threshold",
    "rank",
    "recipe",
    "recipe_version",
    "bundle",
    "pixel_threshold",
    "regions",
    "left",
    "top",
    "right",
    "bottom",
    "source",
    "picture",
    "latency_ms",
)
"""Columns of the CSV file; `regions` is their number, and `left` to `bottom` the box of the strongest."""

_TAIL = 4000  # lines; more than are given again after a kill
_CURE = "give each line, and each sink, its own file"


@dataclass(frozen=True)
class JsonlOptions:
    """`[[sink]]` of kind `jsonl`: starts a new file at a size (`100MB`) or each `day`, and keeps `keep` old ones."""

    path: str
    rotate: str | None = None
    keep: int = 30

    def __post_init__(self) -> None:
        _check_rotation(self.rotate, self.keep)


@dataclass(frozen=True)
class CsvOptions:
    """`[[sink]]` of kind `csv`: as `jsonl`, with the columns `COLUMNS`, without events."""

    path: str
    rotate: str | None = None
    keep: int = 30

    def __post_init__(self) -> None:
        _check_rotation(self.rotate, self.keep)


def _check_rotation(rotate: str | None, keep: int) -> None:
    if keep < 0:
        raise ValueError(f"`keep` is {keep}; it must be at least 0")
    if rotate is not None:
        try:
            Rotation.parse(rotate, keep, "rotate = ")
        except ConfigError as error:
            raise ValueError(error.what) from error


class _LinesSink(ABC):
    """A file that skips records it has: its last lines are read when it is opened."""

    batch = 500
    refused = 0
    refusal = ""

    def __init__(self, path: Path, rotate: str | None, keep: int) -> None:
        self._path = path
        self._rotation = None if rotate is None else Rotation.parse(rotate, keep)
        self._file: LineFile | None = None
        self._has: set[str] = set()
        self._doubtful = 0  # this many of the next records may be there already

    def open(self) -> None:
        """Open the file and read its end; see `Sink`."""
        self.close()
        self._file = self._opened()
        self._has = set()
        self._doubtful = _TAIL
        for line in self._file.tail(_TAIL):
            with suppress(ValueError, TypeError, KeyError, IndexError, csv.Error):
                self._has.add(self._key_of(line.decode("utf-8")))

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Append new records; see `Sink`."""
        assert self._file is not None
        for record in records:
            line = self._line(record)
            if line is not None:
                if self._has and self._key_of(line.decode("utf-8")) in self._has:
                    continue
                self._file.write(line)
        self._doubtful -= len(records)
        if self._doubtful <= 0:
            self._has = set()  # no more repeated records can come
        return len(records)

    def sync(self) -> None:
        """Sync the file; see `Sink`."""
        if self._file is not None:
            self._file.sync()

    def state(self) -> dict[str, Any]:
        """See `Sink`."""
        return {"path": encodable(str(self._path))}

    def close(self) -> None:
        """Close the file; see `Sink`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @abstractmethod
    def _opened(self) -> LineFile: ...

    @abstractmethod
    def _line(self, record: Record) -> bytes | None: ...

    @abstractmethod
    def _key_of(self, line: str) -> str: ...


class JsonlSink(_LinesSink):
    """Writes each record as one JSON object per line."""

    def __init__(self, options: JsonlOptions, folder: Path) -> None:
        super().__init__(folder / options.path, options.rotate, options.keep)

    def _opened(self) -> LineFile:
        return LineFile(self._path, b'{"type"', _CURE, rotation=self._rotation)

    def _line(self, record: Record) -> bytes:
        return record.payload + b"\n"

    def _key_of(self, line: str) -> str:
        return str(json.loads(line)["key"])


class CsvSink(_LinesSink):
    """Writes each part as a row of a table."""

    def __init__(self, options: CsvOptions, folder: Path) -> None:
        super().__init__(folder / options.path, options.rotate, options.keep)

    def _opened(self) -> LineFile:
        header = _row(COLUMNS)
        if self._path.is_file() and self._path.stat().st_size:
            with self._path.open("rb") as stream:
                found = stream.readline()
            if found.rstrip() != header.rstrip():
                raise ConfigError(
                    f"{self._path}: this is a different table.",
                    "Its header differs from the one of this version.",
                    "move it away, or name another file",
                )
        return LineFile(self._path, b"", _CURE, rotation=self._rotation, header=header)

    def _line(self, record: Record) -> bytes | None:
        data = record.data
        if data.get("type") != "part":
            return None
        regions = data["regions"]
        box = regions[0]["bbox"] if regions else ("", "", "", "")
        values = {**data, "regions": len(regions), **dict(zip(("left", "top", "right", "bottom"), box, strict=True))}
        return _row([values[name] for name in COLUMNS])

    def _key_of(self, line: str) -> str:
        return line.rstrip("\n")  # given again, a record makes the same line


def _row(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    plain = ["" if value is None else " ".join(value.split()) if isinstance(value, str) else value for value in values]
    csv.writer(text, lineterminator="\n").writerow(plain)
    return encodable(text.getvalue()).encode()
