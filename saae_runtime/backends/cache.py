"""The cache folder for what a backend compiles from a bundle on one machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..bundle import Bundle
from ..files import canonical_json, sha256_bytes

__all__ = ["cache_folder", "user_cache"]


def cache_folder(bundle: Bundle, cache: bool | str | Path | None) -> Path | None:
    """A writable folder for compiled forms of this bundle, or None.

    Beside the bundle (`zipper.cache` for `zipper`), else in the user's cache folder. Never inside the bundle, which is
    copied and whose hashes do not cover compiled forms. The last part of the path is made from those hashes, so that a
    rebuilt bundle does not use what was compiled from the old one.

    Args:
        bundle: the bundle.
        cache: False for none, True or None for the usual place, or the folder itself.
    """
    if cache is False:
        return None
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    identity = sha256_bytes(canonical_json(files).encode())[:16]
    if cache is True or cache is None:
        places = [bundle.path.with_name(f"{bundle.path.name}.cache")]
        if (own := user_cache()) is not None:
            places.append(own)
    else:
        places = [Path(cache)]
    for place in places:
        folder = place / identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def user_cache() -> Path | None:
    """The user's cache folder of saae: $SAAE_CACHE, else below the user's cache folder. It may not exist.

    None for a user without a home, such as a service's.
    """
    if own := os.environ.get("SAAE_CACHE"):
        return Path(own)
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saae"
    return None
