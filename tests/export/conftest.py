"""The export's tests: a file that imports a library which is not installed is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from folders import shared_folder
from needs import skips_without

if TYPE_CHECKING:
    from saae_export.pipeline.build import BuildResult

pytest_pycollect_makemodule = skips_without(
    "jinja2", "onnx", "onnxruntime", "onnxscript", "safetensors", "scipy", "timm", "torch"
)


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The folder of the graphs that were exported in this run, which all workers share: none is exported twice.

    PyTorch's exporter takes 3 s even for a tiny one. `exported_anew` asks it each time.
    """
    if find_spec("torch") is None or find_spec("onnxscript") is None:
        yield None
        return
    from exported_before import once

    from saae_export.graph import onnx_file

    folder = shared_folder(tmp_path_factory, "exported")
    trace = onnx_file.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", once(trace, folder))
        yield folder


@pytest.fixture
def exported_anew(exported_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of the exporter: what was exported before does not count."""
    from saae_export.graph import onnx_file

    monkeypatch.setattr(onnx_file, "trace", onnx_file.trace.__wrapped__)  # type: ignore[attr-defined]


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
