"""Imports and opens ONNX Runtime with standard output kept for the caller's own results."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["import_onnxruntime", "stdout_kept"]


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Within the block, what ONNX Runtime prints goes to standard error.

    Its GPU package prints while it is imported, while it loads CUDA's libraries and while it opens a session. A program
    that writes its results to standard output (`saae-run --json -`) would begin with that.
    """
    with redirect_stdout(sys.stderr if sys.stderr is not None else io.StringIO()):
        yield


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        Exception: whatever its import raises; a wheel for another platform fails in many ways.
    """
    with stdout_kept():
        return importlib.import_module("onnxruntime")
