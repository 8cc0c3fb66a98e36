"""Folders that tests copy, damage and look through; no library needed."""

from __future__ import annotations

import shutil
from pathlib import Path


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders anywhere below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith("tmp"))


def copy_tree(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target
