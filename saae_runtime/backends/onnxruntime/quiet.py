"""Imports and opens ONNX Runtime without output on standard output."""

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
    """Within the block, ONNX Runtime's output goes to standard error.

    Its GPU package prints when it is imported, loads CUDA's libraries and opens a session, which would disturb results
    on standard output (`saae-run --json -`).
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
