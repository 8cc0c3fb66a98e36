"""Packages for the environments that tests make, by uv: pip takes six times its CPU time to unpack them."""

from __future__ import annotations

import os
import sys

from needs import need


def uv_install(*words: str | os.PathLike[str]) -> list[str]:
    """The command that installs what these words say; without `--python` for the Python that is running."""
    place = [] if "--python" in words else ["--python", sys.executable]
    return [need("uv").find_uv_bin(), "pip", "install", "-q", "--no-config", *place, *map(str, words)]
