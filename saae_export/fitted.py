"""Which images lie in a bundle's memory, so that no thresholds are taken from them later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from saae_runtime.bundle import Bundle
from saae_runtime.errors import BundleCorruptError
from saae_runtime.files import write_json

__all__ = ["read_fitted", "write_fitted"]

_FILE = "fitted.json"


def write_fitted(folder: Path, hashes: Sequence[str]) -> None:
    """Write them into the folder of a bundle that is being made.

    Args:
        folder: of the bundle.
        hashes: hex sha256 of the image files that the memory was made from.
    """
    write_json(folder / _FILE, {"sha256": sorted(hashes)})


def read_fitted(bundle: Bundle) -> frozenset[str]:
    """Hex sha256 of the image files in the memory; empty for a bundle without one, or from before they were written.

    Raises:
        BundleCorruptError: the file is damaged.
    """
    if _FILE not in bundle.manifest.files:
        return frozenset()
    try:
        return frozenset(map(str, json.loads(bundle.file(_FILE).read_text(encoding="utf-8"))["sha256"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise BundleCorruptError(
            f"{bundle.path}: {_FILE} cannot be read.",
            f"{type(error).__name__}: {error}",
            "copy the bundle again, or rebuild it: saae-export build",
        ) from error
