"""What a first build left, to build again from; and builds that end before the export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from folders import copy_tree

if TYPE_CHECKING:
    from saae_export.pipeline.build import BuildResult
    from saae_runtime import Bundle


@pytest.fixture
def again(built: tuple[BuildResult, str, Path], tmp_path: Path) -> Path:
    """A folder with everything a first build left: bundle, fitted model, features."""
    return copy_tree(built[2], tmp_path / "again")


@pytest.fixture
def until_export(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Builds end before the export (it takes seconds); the list gets the frame sizes that it was asked for."""
    from tiny_builds import Enough  # late: needs PyTorch

    from saae_export.pipeline import graphs

    sizes: list[object] = []

    def end(checkpoint: object, folder: object, frame_size: object, *_: object) -> None:
        sizes.append(frame_size)
        raise Enough

    monkeypatch.setattr(graphs, "write_graphs", end)
    return sizes


@pytest.fixture(scope="session")
def at_model_size(built: tuple[BuildResult, str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same fitted model with its graph left at the model's size."""
    from tiny_builds import fitted_model, options, quiet_build  # late: needs PyTorch

    folder = tmp_path_factory.mktemp("model-size")
    chosen = options(data, folder, checkpoint=fitted_model(built[2]), frame_size="model", precisions=("fp32",))
    return quiet_build(chosen)[0].bundle


@pytest.fixture(scope="session")
def held(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, Path]:
    """A build without a memory: images are held out, and thresholds are the paper's."""
    from tiny_builds import options, quiet_build  # late: needs PyTorch

    folder = tmp_path_factory.mktemp("held")
    chosen = options(data, folder, precisions=("fp32", "fp16"))
    result, _ = quiet_build(dataclasses.replace(chosen, config=chosen.config.with_values({"score": "cosine"})))
    return result, folder
