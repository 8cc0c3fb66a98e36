"""The benchmarks' tests: a file that imports a library which is not installed is skipped with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import skips_without

pytest_pycollect_makemodule = skips_without(
    "onnx", "onnxruntime", "onnxscript", "safetensors", "scipy", "sklearn", "timm", "torch"
)


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_kept(exported_once: Path | None) -> None:
    """No test exports what one before has exported."""
