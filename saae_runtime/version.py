"""The installed versions of saae and other libraries."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

__all__ = ["library_versions", "saae_version"]


def saae_version() -> str:
    """The version of this distribution."""
    try:
        return version("saae")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of `names` (PyPI distributions) that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
