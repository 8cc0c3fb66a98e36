"""The graph's tests ask PyTorch's exporter every time: it is what they test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def exported_anew(exported_once: Path | None) -> Iterator[None]:
    """Takes back what `exported_once` does, for the tests of a file."""
    if exported_once is None:
        yield
        return
    from saae_export.graph import onnx_file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", onnx_file.trace.__wrapped__)  # type: ignore[attr-defined]
        yield
