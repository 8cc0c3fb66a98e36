"""The audit log: who changed what and when. Each line contains the hash of the previous line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..appending import LineFile
from ..errors import ConfigError, SaaeError, StorageError, shown
from ..files import canonical_json, open_regular, sha256_bytes, write_json
from ..meter import one_line
from .part import now, stamp

__all__ = ["AuditLog", "Findings", "explain", "head_of", "verify"]

_FIRST = "0" * 64
_LONGEST = 1 << 20  # bytes of a line
_PROBLEMS = 20  # listed problems
_HEAD_LIMIT = 1 << 16


class AuditLog:
    """Appends entries to a file, which it locks while it is open.

    An entry is one line of JSON with its number `n` from 1, `time` (UTC), `who`, `role`, `what`, `data`, and
    `previous`, the sha256 of the line before. It is on the disk when `append` returns. Beside the file, `NAME.head`
    holds number and hash of the last entry, so that missing entries at the end are detected. An entry that cannot be
    written completely is taken back.

    Args:
        path: the file; created if missing.
        copy: called with each entry and its `sha256`, to keep a copy elsewhere, which nobody on this machine can
            rewrite.

    Attributes:
        damage: what was wrong with the end of the file when it was opened; empty: nothing. The first new entry says it.
        failed: why that entry could not be written at once; empty: it was, or there is none.

    Raises:
        ConfigError: another process has it open.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, copy: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path = path
        self._copy = copy
        self._lock = threading.Lock()
        self._file = LineFile(path, cure="give each line its own folder for the audit log")
        self._closed = False
        self.failed = ""
        try:
            lines = self._file.tail(1)
            self._number, self._hash = _place(lines[-1] if lines else b"")
            self.damage = self._compared()
            self._number, self._end = max(self._number, 0), self._file.end
            self._unsaid = bool(self.damage)
            try:
                self._say_damage()
            except StorageError as error:
                self.failed = one_line(error)
        except BaseException:
            self._file.close()
            raise

    def append(self, who: str, role: str, what: str, data: Mapping[str, Any]) -> str:
        """Write an entry.

        Args:
            who: the user's name.
            role: the user's role.
            what: the action, such as `threshold`.
            data: JSON values.

        Returns:
            The entry's sha256.

        Raises:
            StorageError: it could not be written.
        """
        with self._lock:
            self._say_damage()
            entry = self._append(who, role, what, data)
        if self._copy is not None:
            self._copy(entry)
        return str(entry["sha256"])

    def _say_damage(self) -> None:
        """The entry that says what was wrong; while it cannot be written, no other one is."""
        if self._unsaid:
            entry = self._append("saae-line", "service", "audit log damaged", {"words": self.damage})
            self._unsaid = False
            if self._copy is not None:
                self._copy(entry)

    def _append(self, who: str, role: str, what: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Write an entry, completely or not at all, and return it with its sha256; the lock is held."""
        if self._closed:
            raise StorageError(f"{self.path} is closed.", "The service is stopping.", "")
        entry = {
            "n": self._number + 1,
            "time": stamp(now()),
            "who": who,
            "role": role,
            "what": what,
            "data": dict(data),
            "previous": self._hash,
        }
        line = canonical_json(entry).encode("ascii")
        digest = sha256_bytes(line)
        if self._file.end != self._end:  # a refused entry that could not be taken back then
            self._file.cut(self._end)
        try:
            self._file.write(line + b"\n")
            self._file.sync()
            write_json(head_of(self.path), {"n": self._number + 1, "sha256": digest})
        except BaseException:
            with suppress(StorageError):
                self._file.cut(self._end)
            raise
        self._number, self._hash, self._end = self._number + 1, digest, self._file.end
        return {**entry, "sha256": digest}

    def latest(self, count: int) -> list[dict[str, Any]]:
        """At most this many last entries, the latest first."""
        with self._lock:
            lines = self._file.tail(count) if not self._closed else []
        found = []
        for line in reversed(lines):
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"what": "unreadable"})
        return found

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._lock:
            self._closed = True
            self._file.close()

    def _compared(self) -> str:
        """How the end of the file differs from the head file; empty if the head file is at most one entry behind."""
        try:
            number, digest = _read_head(self.path)
        except FileNotFoundError:
            return f"there is no {head_of(self.path).name}, yet {self._number} entries" if self._number else ""
        except (OSError, ValueError) as error:
            return f"{head_of(self.path).name} cannot be read: {error}"
        if self._number < 0:
            return "the last line is not an entry"
        if number > self._number:
            return f"{number - self._number} entries are missing at the end"
        if self._number == number and digest != self._hash:
            return "the last entry is another one"
        if self._number > number + 1:
            return f"{self._number - number} entries more than were written"
        return ""


@dataclass(frozen=True)
class Findings:
    """The result of `verify`.

    Attributes:
        entries: number of lines.
        problems: descriptions of the first 20; empty: the chain is intact.
        notes: remarks that are not problems.
        sha256: of the last line.
    """

    entries: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str


def verify(path: Path, anchor: str | None = None) -> Findings:
    """Read a whole audit log and follow its chain.

    A line that was changed, removed, added or moved breaks the chain. Missing entries at the end are detected by the
    head file. Anyone who can write both files can write a new chain. Only a hash that was kept elsewhere (the line's
    sinks get each entry's hash, too) detects that: give it as `anchor`.

    Args:
        path: the file.
        anchor: sha256 of an entry that must be in it.

    Raises:
        ConfigError: it cannot be read.
    """
    problems: list[str] = []
    notes: list[str] = []
    expected, number, digest, anchored = 1, 0, _FIRST, False
    before = _FIRST
    try:
        for place, line in enumerate(_lines(path), start=1):
            number, before, digest = place, digest, sha256_bytes(line)
            anchored = anchored or digest == anchor
            problem = _problem(line, expected, before)
            expected += 1
            if problem:
                problems.append(f"line {place}: {problem}")
                with_number = _place(line)[0]
                expected = with_number + 1 if with_number > 0 else expected
            elif json.loads(line)["what"] == "audit log damaged":
                notes.append(f"line {place}: the service found the log damaged when it started")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read.", str(error), "check path and permissions") from error
    _compare_head(path, number, digest, before, problems, notes)
    if anchor is not None and not anchored:
        problems.append(f"no entry has the hash {shown(anchor)[1:-1]}")
    more = len(problems) - _PROBLEMS
    if more > 0:
        problems = [*problems[:_PROBLEMS], f"and {more} more"]
    return Findings(number, tuple(problems), tuple(notes[:_PROBLEMS]), digest)


def head_of(path: Path) -> Path:
    """The file that holds number and hash of the last entry."""
    return path.with_name(f"{path.name}.head")


def _compare_head(path: Path, number: int, digest: str, before: str, problems: list[str], notes: list[str]) -> None:
    try:
        known, head = _read_head(path)
    except FileNotFoundError:
        if number:
            problems.append(f"{head_of(path).name} is missing: entries cut off at the end cannot be seen")
        return
    except (OSError, ValueError) as error:
        problems.append(f"{head_of(path).name} cannot be read: {error}")
        return
    if known == number and head == digest:
        return
    if known == number - 1 and head == before:
        notes.append("the last entry is newer than the head file: the service was killed between the two")
    elif known > number:
        problems.append(f"{known - number} entries are missing at the end")
    else:
        problems.append(f"the head file names entry {known} with another hash")


def _problem(line: bytes, expected: int, before: str) -> str:
    if len(line) > _LONGEST:
        return "longer than an entry can be"
    try:
        entry = json.loads(line)
        same = canonical_json(entry).encode("ascii") == line
    except (ValueError, RecursionError):
        return "no entry"
    if not isinstance(entry, dict) or not {"n", "time", "who", "role", "what", "data", "previous"} <= entry.keys():
        return "no entry"
    if entry["n"] != expected:
        return f"entry {shown(entry['n'])} where {expected} belongs"
    if entry["previous"] != before:
        return "it does not fit the line before it"
    return "" if same else "not written by the service"


def _place(line: bytes) -> tuple[int, str]:
    """Number and hash of an entry; -1 for a line that is not an entry, 0 for no line."""
    if not line:
        return 0, _FIRST
    try:
        number = json.loads(line)["n"]
        return (number if type(number) is int and number > 0 else -1), sha256_bytes(line)
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1, sha256_bytes(line)


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as stream:
        while line := stream.readline(_LONGEST + 2):
            if not line.endswith(b"\n") and len(line) <= _LONGEST:
                yield line + b" (cut in half)"
                return
            yield line.rstrip(b"\n")


def _read_head(path: Path) -> tuple[int, str]:
    with open_regular(head_of(path)) as stream:
        data = stream.read(_HEAD_LIMIT)
    try:
        head = json.loads(data)
        number, digest = head["n"], head["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a head file") from error
    if type(number) is not int or not isinstance(digest, str):
        raise ValueError("not a head file")
    return number, digest


def explain(found: Findings) -> SaaeError | None:
    """The error that says what is wrong with a log; None if it is intact."""
    if not found.problems:
        return None
    count = len(found.problems)
    return ConfigError(
        f"{count} problem{'' if count == 1 else 's'} in {found.entries} entries.",
        "\n       ".join(found.problems),
        "compare with the copy of the entries that the line's sinks have (records of the type `audit`)",
    )
