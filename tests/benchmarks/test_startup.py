"""benchmarks/startup.py on a tiny bundle: stages in order, no PyTorch in the timed process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundle import make_tiny_bundle

from benchmarks import startup
from saae_runtime.errors import SaaeError

pytestmark = pytest.mark.needs("onnxruntime")


def test_stages_come_in_order_and_without_torch(tmp_path: Path) -> None:
    found = startup.run_once(make_tiny_bundle(tmp_path / "tiny"), "onnxruntime:cpu", (64, 96))
    stages = [found["stages"][name] for name in startup.STAGES]
    assert stages == sorted(stages)
    assert stages[0] > 0
    parts = startup.parts([found])
    assert list(parts) == list(startup.STAGES)
    assert all(part[0] >= 0 for part in parts.values())
    work = [found["cpu"][name] for name in startup.STAGES]
    assert work == sorted(work)
    assert work[-1] > 0
    assert sum(part[0] for part in parts.values()) == pytest.approx(stages[-1])
    assert found["torch"] is False
    assert found["peak_kib"] > 0


def test_a_bundle_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SaaeError, match="BundleNotFoundError"):
        startup.run_once(tmp_path / "nothing", "auto", (64, 96))
