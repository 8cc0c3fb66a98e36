"""Three fake backends of known speed, and a bundle for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_backends import (
    World,
    bundle_at,
)

from saae_runtime import Bundle, backends, open_bundle
from saae_runtime.backends import timing


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """Three fake backends; slow comes first in the fixed order."""
    made = World()
    made.speeds = {("slow", "fp32"): 0.3, ("swift", "fp32"): 0.1, ("swift", "bf16"): 0.04, ("steady", "fp32"): 0.2}
    monkeypatch.delenv("SAAE_MEASURE", raising=False)
    monkeypatch.delenv("SAAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(("slow", "steady", "swift"), "fake"))
    monkeypatch.setattr(backends, "AUTO_ORDER", ("slow", "steady", "swift"))
    monkeypatch.setattr(backends, "_modules", lambda: {"fake": made})
    monkeypatch.setattr(backends, "_clock", made.clock)
    monkeypatch.setattr(timing, "_known", {})
    return made


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(bundle_at(tmp_path / "tiny"))
