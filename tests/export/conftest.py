"""The export's tests: a file that imports a library which is not installed is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from needs import skips_without

from saae_runtime.backends.openvino.library import device_missing, load_library

if TYPE_CHECKING:
    from saae_export.pipeline.build import BuildResult

pytest_pycollect_makemodule = skips_without(
    "jinja2", "onnx", "onnxruntime", "onnxscript", "safetensors", "scipy", "timm", "torch"
)


@pytest.fixture(scope="session", autouse=True)
def _graphs_are_kept(exported_once: Path | None) -> None:
    """No test exports what one before has exported."""


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The folder of what OpenVINO has compiled here; None without it."""
    return None if device_missing("CPU")[0] else tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def _networks_are_kept(networks: Path | None) -> Iterator[None]:
    """A build opens five engines, most of them on graphs that another has opened before."""
    if networks is None:
        yield
        return
    core = load_library().core
    core.set_property({"CACHE_DIR": str(networks)})
    yield
    core.set_property({"CACHE_DIR": ""})


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small drawn images of a weave to fit on, and some to test on. To be copied before it is changed."""
    from tiny_builds import draw  # late: needs PyTorch

    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, str, Path]:
    """A tiny build from `data`: its result, what was printed, and the folder with the bundle, the fitted model and the
    features. To be copied before it is changed."""
    from tiny_builds import options, quiet_build  # late: needs PyTorch

    folder = tmp_path_factory.mktemp("built")
    result, text = quiet_build(options(data, folder, measure_latency=True))
    return result, text, folder
