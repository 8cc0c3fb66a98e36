"""Reads TOML tables as frozen dataclasses: checks keys, types and bounds, and finds all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ..errors import ConfigError, shown
from ..files import read_regular

__all__ = ["Problems", "read", "read_toml"]

T = TypeVar("T")

_LARGEST = 2**63 - 1
_FILE_LIMIT = 4 << 20  # bytes
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


class Problems:
    """Collects the problems of a file.

    Args:
        file: its name, for the message.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._found: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Add a problem; `where` is the table or key."""
        self._found.append(f"{where}: {what}" if where else what)

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_any(self) -> None:
        """Raise ConfigError if there was a problem."""
        if not self._found:
            return
        count = len(self._found)
        raise ConfigError(
            f"{self._file}: {count} problem{'' if count == 1 else 's'}.",
            "\n       ".join(self._found),
            "correct the file; `saae-line init` writes an example with the usual keys explained",
        )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: missing, unreadable, not TOML, or no library that reads it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ConfigError(
                "TOML files cannot be read.", "Python 3.10 has no TOML reader.", "pip install 'saae[line]'"
            ) from error
    try:
        text = read_regular(path, _FILE_LIMIT).decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file.", "", f"saae-line init {path} --bundle BUNDLE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text.", str(error), "save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read.", str(error), "check path and permissions") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML.", str(error), "correct that line") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply.", "", "flatten it") from error


def read(kind: type[T], table: Any, where: str, problems: Problems) -> T | None:
    """Convert a table to a dataclass.

    Fields may be str, int, float, bool, `X | None`, Literal, tuples and mappings of these, and dataclasses (a table, or
    in a tuple an array of tables). A ValueError of `__post_init__` is a problem of the table.

    Args:
        kind: the dataclass.
        table: the parsed table.
        where: the table's name, for messages.
        problems: collects problems.

    Returns:
        The dataclass; None if there is a problem.
    """
    if not isinstance(table, Mapping):
        problems.add(where, f"expected a table, found {shown(table)}")
        return None
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    good = True
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(fields)}"
            problems.add(where, f"unknown key `{shown(key)[1:-1]}`; {hint}")
            good = False
    found: dict[str, Any] = {}
    for key, item in fields.items():
        if key in table:
            inside = f"{where} {key}" if where else key
            try:
                found[item.name] = _value(hints[item.name], table[key], inside, problems)
            except _WrongError as error:
                problems.add(error.where, error.what)
                good = False
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.add(where, f"`{key}` is missing")
            good = False
    if not good:
        return None
    try:
        return kind(**found)
    except ValueError as error:
        problems.add(where, str(error))
        return None


class _WrongError(Exception):
    def __init__(self, where: str, what: str) -> None:
        self.where, self.what = where, what


def _value(kind: Any, value: Any, where: str, problems: Problems) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        found = read(kind, value, where, problems)
        if found is None:
            raise _WrongError(where, "the table is not valid")
        return found
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where, problems)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) not in {isinstance(item, bool) for item in arguments}:
            raise _WrongError(where, f"{shown(value)} is not one of {', '.join(str(item) for item in arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _WrongError(where, f"expected a list, found {shown(value)}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise _WrongError(where, f"expected {len(arguments)} values, found {len(value)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_value(part, item, f"{where}[{i}]", problems) for i, (part, item) in enumerate(pairs))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _WrongError(where, f"expected a table, found {shown(value)}")
        return {str(key): _value(arguments[1], item, f"{where} {key}", problems) for key, item in value.items()}
    return _plain(kind, value, where)


def _union(kinds: tuple[Any, ...], value: Any, where: str, problems: Problems) -> Any:
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    first: _WrongError | None = None
    for kind in kinds:
        try:
            return _value(kind, value, where, problems)
        except _WrongError as error:
            first = first or error
    assert first is not None
    if len(kinds) > 1:
        raise _WrongError(where, f"{shown(value)} has the wrong type")
    raise first


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _WrongError(where, f"expected {_NAMES[kind]}, found {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _WrongError(where, f"expected a finite number, found {shown(value)}")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        raise _WrongError(where, "expected a number of at most 64 bits")
    if isinstance(value, str) and any(ord(letter) < 32 and letter not in "\t\n" for letter in value):
        raise _WrongError(where, f"expected plain text, found {shown(value)}")
    return value
