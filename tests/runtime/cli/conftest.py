"""A tiny bundle for the tests of the command, and frames for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.render import save_png

SPOT = (10, 20, 9, 14)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle; read only."""
    need("onnxruntime")
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Four images: clean, defective, clean, of a different size and defective."""
    folder = tmp_path / "frames"
    save_png(folder / "a.png", gray_frame())
    save_png(folder / "b.png", gray_frame(spot=SPOT))
    save_png(folder / "c.png", gray_frame())
    save_png(folder / "d.png", gray_frame((128, 192), (40, 60, 40, 50)))
    return folder


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Two images without a defect."""
    folder = tmp_path / "clean"
    save_png(folder / "a.png", gray_frame())
    save_png(folder / "c.png", gray_frame())
    return folder
