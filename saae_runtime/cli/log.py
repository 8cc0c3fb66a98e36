"""The result log of a run: JSON lines into a file or to standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..appending import LineFile, Rotation
from .outputs import Standard

__all__ = ["JsonLines"]


class JsonLines:
    """One JSON object per line, each written at once; see `saae_runtime.appending.LineFile`.

    Args:
        target: a file (folders made), or a `Standard` for standard output.
        overwrite: empty the file first.
        rotation: when to begin a new file: NAME becomes NAME.1, that NAME.2, and so on.

    Raises:
        ConfigError: another run writes this file.
        StorageError: the file cannot be written.
    """

    def __init__(self, target: str | Standard, overwrite: bool = False, rotation: Rotation | None = None) -> None:
        self._standard = target if isinstance(target, Standard) else None
        self._file: LineFile | None = None
        if not isinstance(target, Standard):
            cure = "give each run its own --json FILE"
            self._file = LineFile(Path(target), b'{"source"', cure, overwrite, rotation)

    @property
    def plain(self) -> bool:
        """Whether the target is a regular file."""
        return self._file is not None and self._file.plain

    def write(self, record: dict[str, Any]) -> None:
        """Write a line and hand it to the system at once.

        Raises:
            StorageError: the disk is full; earlier lines stay complete, and the next call tries again.
            BrokenPipeError: the reader of standard output has closed it.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode("ascii")
        if self._standard is not None:
            self._standard.write(line)
        elif self._file is not None:
            self._file.write(line)

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
