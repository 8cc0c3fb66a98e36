"""Writes records to SQLite: a table of parts, each once, and a table of events."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from ...errors import ConfigError, StorageError
from ...files import encodable
from ..ages import Ages
from ..part import now, stamp
from ..spool_records import Record
from .base import Hurry

__all__ = ["SCHEMA", "SqliteOptions", "SqliteSink"]

SCHEMA = 2
"""Version of the tables, in `PRAGMA user_version`."""

_TABLES = """
CREATE TABLE IF NOT EXISTS parts (
    key TEXT PRIMARY KEY NOT NULL, recorded TEXT NOT NULL,
    station TEXT NOT NULL, time TEXT NOT NULL, part_id TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
    recipe TEXT, recipe_version INTEGER, bundle TEXT, score REAL, rank REAL, threshold REAL, pixel_threshold REAL,
    regions TEXT NOT NULL, source TEXT, picture TEXT, latency_ms REAL, masks TEXT
);
CREATE INDEX IF NOT EXISTS parts_by_recording ON parts (recorded);
CREATE INDEX IF NOT EXISTS parts_by_time ON parts (time);
CREATE INDEX IF NOT EXISTS parts_by_id ON parts (part_id);
CREATE TABLE IF NOT EXISTS events (key TEXT PRIMARY KEY, type TEXT, time TEXT, station TEXT, data TEXT NOT NULL);
"""
_COLUMNS = (
    "key",
    "recorded",
    "station",
    "time",
    "part_id",
    "verdict",
    "reason",
    "recipe",
    "recipe_version",
    "bundle",
    "score",
    "rank",
    "threshold",
    "pixel_threshold",
    "regions",
    "source",
    "picture",
    "latency_ms",
    "masks",
)
_INSERT = f"INSERT OR IGNORE INTO parts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_PRUNE_EVERY = 600.0  # seconds
_PRUNE = 5000  # rows at once


@dataclass(frozen=True)
class SqliteOptions:
    """`[[sink]]` of kind `sqlite`: the file; parts recorded more than `days` ago are removed (by default never)."""

    path: str
    days: float | None = None

    def __post_init__(self) -> None:
        if self.days is not None and not self.days > 0:
            raise ValueError(f"`days` is {self.days}; it must be above 0")


class SqliteSink:
    """A database that others may read meanwhile (write-ahead log). A repeated part is one row."""

    batch = 500
    refused = 0
    refusal = ""

    def __init__(self, options: SqliteOptions, folder: Path) -> None:
        self._path, self._days = folder / options.path, options.days
        self._database: sqlite3.Connection | None = None
        self._pruned = 0.0
        self._ages: Ages | None = None

    def open(self) -> None:
        """Open the file and make the tables; see `Sink`."""
        self.close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None, check_same_thread=False)
            found = self._database.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, SCHEMA):
                raise ConfigError(
                    f"{self._path}: the tables have version {found}.",
                    f"This saae writes {SCHEMA}.",
                    "name another file",
                )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            if found != SCHEMA:  # at once: each transaction waits for the disk
                self._database.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={SCHEMA};COMMIT;")
            if self._ages is None and self._days is not None:
                newest = self._database.execute("SELECT strftime('%s', max(recorded)) FROM parts").fetchone()[0]
                memory = self._path.with_name(f"{self._path.name}.age")
                self._ages = Ages(None if newest is None else float(newest), memory, lambda: now().timestamp())
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    def write(self, records: Sequence[Record], hurry: Hurry) -> int:
        """Write the records in one transaction; see `Sink`."""
        assert self._database is not None
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                for record in records:
                    self._insert(self._database, record)
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            if not hurry.is_set():
                self._prune(self._database)
        except sqlite3.Error as error:
            raise self._error(error) from error
        return len(records)

    def _insert(self, database: sqlite3.Connection, record: Record) -> None:
        data = record.data
        if data.get("type") == "part":
            plain = {**data, "regions": json.dumps(data["regions"]), "recorded": self._recorded()}
            plain["masks"] = None if data["masks"] is None else json.dumps(data["masks"])
            database.execute(_INSERT, [_value(plain[name]) for name in _COLUMNS])
        else:
            values = (
                record.key,
                data.get("type"),
                data.get("time"),
                data.get("station"),
                record.payload.decode("utf-8"),
            )
            database.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", [_value(item) for item in values])

    def _recorded(self) -> str:
        """The time that a row's age counts from."""
        return stamp(now() if self._ages is None else datetime.fromtimestamp(self._ages.stamp(), timezone.utc))

    def _prune(self, database: sqlite3.Connection) -> None:
        if (
            self._days is None
            or self._ages is None
            or (time.monotonic() - self._pruned < _PRUNE_EVERY and self._pruned)
        ):
            return
        before = stamp(datetime.fromtimestamp(self._ages.now(), timezone.utc) - timedelta(days=self._days))
        query = "DELETE FROM parts WHERE rowid IN (SELECT rowid FROM parts WHERE recorded < ? LIMIT ?)"
        if database.execute(query, (before, _PRUNE)).rowcount < _PRUNE:
            self._pruned = time.monotonic()

    def sync(self) -> None:
        """Do nothing: a transaction is on the disk when it ends."""

    def state(self) -> dict[str, Any]:
        """See `Sink`."""
        return {"path": encodable(str(self._path))}

    def close(self) -> None:
        """Close the file; see `Sink`."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _error(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self._path} cannot be written.",
            f"{type(error).__name__}: {error}",
            "check disk, permissions and other users of the file",
        )


def _value(value: Any) -> Any:
    return encodable(value) if isinstance(value, str) else value
