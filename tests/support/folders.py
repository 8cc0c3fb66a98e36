"""Folders that tests copy, damage and look through; no library needed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders anywhere below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith("tmp"))


def copy_tree(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder for what is made once in a run: the workers of pytest-xdist share the folder above their own."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
