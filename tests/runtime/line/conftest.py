"""Fixtures of the line's tests: one bundle for all of them, and engines that are opened once."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import need, skips_without
from tiny_bundle import make_tiny_bundle

from saae_runtime.line.engines import Engines

pytest_pycollect_makemodule = skips_without(
    "onnx", "onnxruntime", "pymodbus", "asyncua", "fastapi", "starlette", "uvicorn", "python_multipart"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, threshold 40; read only."""
    need("onnxruntime")
    return make_tiny_bundle(tmp_path_factory.mktemp("line") / "tiny")


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with threshold 200, which nothing exceeds; read only."""
    need("onnxruntime")
    return make_tiny_bundle(tmp_path_factory.mktemp("line") / "other", threshold=200.0)


@pytest.fixture
def engines() -> Engines:
    """Engines of one test."""
    found = Engines()
    yield found
    found.close()
