"""Changes of recipes made while the line ran, kept in a file and applied again after a restart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import shown
from ..files import canonical_json, read_regular, sha256_bytes, write_json
from ..meter import one_line
from .config import LineConfig, RecipeConfig
from .part import now, stamp
from .recalibrate import versions

__all__ = ["InForce"]

_FIELDS = ("bundle", "threshold", "false_alarms")
_LIMIT = 1 << 20


class InForce:
    """The file of changes.

    A change applies as long as the recipe's table in line.toml is unchanged: an edit of line.toml takes precedence.

    Args:
        path: the file; may be missing.
        config: of line.toml.
    """

    def __init__(self, path: Path, config: LineConfig) -> None:
        self._path, self._config = path, config

    def read(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Changes by recipe (for `RecipeBook.change`), and the changes that do not apply, with the reason."""
        found: dict[str, dict[str, Any]] = {}
        problems: dict[str, str] = {}
        try:
            kept = self._all()
        except (OSError, ValueError, RecursionError) as error:
            return {}, {"": f"{self._path} is ignored: {one_line(error)}"}
        for name, item in kept.items():
            try:
                written = self._config.recipe(name)
                if item["recipe"] != _digest(written):
                    problems[name] = "the recipe's table in line.toml has been changed since"
                    continue
                found[name] = self._checked(written, item["changes"])
            except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as error:
                problems[name] = one_line(error) or "line.toml has no such recipe any more"
        return found, problems

    def keep(self, config: RecipeConfig, who: str) -> None:
        """Save how a recipe differs from line.toml.

        Args:
            config: the active configuration.
            who: the user who changed it.

        Raises:
            StorageError: it could not be written.
        """
        written = self._config.recipe(config.name)
        changes = {key: getattr(config, key) for key in _FIELDS if getattr(config, key) != getattr(written, key)}
        try:
            kept = self._all()
        except (OSError, ValueError, RecursionError):
            kept = {}
        kept[config.name] = {"recipe": _digest(written), "changes": changes, "who": who, "time": stamp(now())}
        if not changes:
            del kept[config.name]
        write_json(self._path, kept)

    def _all(self) -> dict[str, Any]:
        try:
            data = json.loads(read_regular(self._path, _LIMIT))
        except FileNotFoundError:
            return {}
        if not isinstance(data, dict):
            raise ValueError("it is not a file of changes")
        return data

    def _checked(self, written: RecipeConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
        if not changes.keys() <= set(_FIELDS):
            raise ValueError(f"{shown(sorted(changes))} cannot be changed")
        place = self._config.place
        bundle = changes.get("bundle", written.bundle)
        if place(bundle) != place(written.bundle) and place(bundle) not in versions(place(written.bundle)):
            raise ValueError(f"{shown(bundle)} is no longer a version of the bundle")
        for key in ("threshold", "false_alarms"):
            if type(changes.get(key)) not in (float, int, type(None)):
                raise ValueError(f"`{key}` is not a number")
        # A value and a rate exclude each other: `change` drops the one that is not given.
        return {key: value for key, value in changes.items() if value is not None}


def _digest(config: RecipeConfig) -> str:
    return sha256_bytes(canonical_json(asdict(config)).encode())
