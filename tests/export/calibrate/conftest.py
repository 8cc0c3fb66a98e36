"""A bundle to calibrate again, and images of good parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from noisy_parts import SIZE, draw
from tiny_bundle import make_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_tiny_bundle(tmp_path / "bundle", SIZE, threshold=40.0, precisions=("fp32", "fp16"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / "good")
