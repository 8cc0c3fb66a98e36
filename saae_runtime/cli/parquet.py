"""Results as a Parquet file, also on a disk that is full for a while."""

from __future__ import annotations

import importlib
import io
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import atomic_file, encodable, storage_error
from .scoring import Outcome

__all__ = ["ParquetFile"]

_ROWS = 1024  # of a row group


class ParquetFile:
    """One row per frame, with its regions as a list; complete when the run ends.

    While the disk is full, what is written waits in memory: a Parquet file with a hole cannot be read.

    Args:
        path: the file.
        min_area: regions of fewer pixels are left out.

    Raises:
        ConfigError: pyarrow is not installed.
        StorageError: the place may not be written to.
    """

    def __init__(self, path: Path, min_area: int = 1) -> None:
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ConfigError("--parquet needs pyarrow.", str(error), "pip install 'saae[parquet]'") from error
        self._min_area = min_area
        self._rows: list[dict[str, Any]] = []
        self._count = 0
        self._schema = self._columns()
        self._stack = ExitStack()
        temporary = self._stack.enter_context(atomic_file(path))
        try:
            file = self._stack.enter_context(_Patient(temporary))
        except OSError as error:
            self._stack.close()
            raise storage_error(path, error) from error
        self._writer: Any = self._stack.enter_context(self._parquet.ParquetWriter(file, self._schema))

    def _columns(self) -> Any:
        arrow = self._arrow
        region = arrow.struct(
            [
                ("bbox", arrow.list_(arrow.int32(), 4)),
                ("area", arrow.int64()),
                ("peak", arrow.list_(arrow.int32(), 2)),
                ("score", arrow.float64()),
            ]
        )
        numbers = ("score", "rank", "image_threshold", "threshold", "defect_share", "ms")
        return arrow.schema(
            [
                ("source", arrow.string()),
                ("frame", arrow.int64()),
                ("verdict", arrow.string()),
                *((name, arrow.float64()) for name in numbers),
                ("height", arrow.int32()),
                ("width", arrow.int32()),
                ("regions", arrow.list_(region)),
                ("error", arrow.string()),
            ]
        )

    def write(self, outcome: Outcome) -> None:
        """See `Export.write`."""
        result = outcome.result
        row: dict[str, Any] = {"source": encodable(outcome.frame.name), "frame": outcome.frame.index}
        if result is None:
            row["error"] = "" if outcome.error is None else encodable(outcome.error.what)
        else:
            row |= result.to_dict(self._min_area)
            row |= {"verdict": "defect" if result.is_anomalous else "clean", "ms": outcome.milliseconds}
        self._rows.append(row)
        self._count += 1
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        self._writer.write_table(self._arrow.Table.from_pylist(rows, schema=self._schema))

    @property
    def unfinished(self) -> int:
        """See `Export.unfinished`."""
        return self._count

    def close(self) -> None:
        """Finish the file and rename it. May be called twice."""
        if self._rows:
            self._flush()
        self._stack.close()

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._rows = []
        gone = _Discarded()
        with suppress(_Discarded):
            self._stack.__exit__(_Discarded, gone, None)
        self._stack = ExitStack()


class _Patient(io.RawIOBase):
    """A new file whose bytes wait in memory while they cannot be written; only its end raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._waiting = bytearray()
        self._end = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._end

    def write(self, data: Any) -> int:
        self._waiting += data
        size = memoryview(data).nbytes
        self._end += size
        with suppress(OSError):
            self._empty()
        return size

    def _empty(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._empty()


class _Discarded(Exception):
    """Raised to remove an unfinished file."""
