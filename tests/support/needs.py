"""Skips with a reason what needs a library that is not installed: one table of libraries and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIBRARIES = {
    "av": "pip install 'saae[video]'",
    "asyncua": "pip install 'saae[opcua]'",
    "build": "pip install 'saae[dev]'",
    "cuda.bindings": "pip install 'saae[cuda]'",
    "cuda.core": "pip install 'saae[tensorrt]'",
    "cv2": "pip install opencv-python-headless",
    "fcntl": "a POSIX system",
    "fastapi": "pip install 'saae[serve]'",
    "harvesters": "pip install 'saae[genicam]'",
    "huggingface_hub": "pip install 'saae[train]'",
    "jinja2": "pip install 'saae[export]'",
    "mkdocstrings": "pip install 'saae[docs]'",
    "onnx": "pip install 'saae[export]'",
    "onnxruntime": "pip install 'saae[cpu]'",
    "pymodbus": "pip install 'saae[modbus]'",
    "onnxscript": "pip install 'saae[export]'",
    "resource": "a POSIX system",
    "pyarrow": "pip install 'saae[parquet]'",
    "pycocotools": "pip install 'saae[dev]'",
    "pycuda": "pip install 'saae[pycuda]'",
    "ray": "pip install 'saae[ray]'",
    "openvino": "pip install 'saae[openvino]'",
    "paho": "pip install 'saae[line]'",
    "prometheus_client": "pip install 'saae[line]'",
    "python_multipart": "pip install 'saae[serve]'",
    "pypylon": "pip install 'saae[pylon]'",
    "schemathesis": "pip install 'saae[dev]'",
    "safetensors": "pip install 'saae[train]'",
    "scipy": "pip install 'saae[train]'",
    "sklearn": "pip install 'saae[dev]'",
    "selenium": "pip install selenium",
    "starlette": "pip install 'saae[serve]'",
    "supervision": "pip install 'saae[dev]'",
    "tensorrt_rtx": "pip install 'saae[tensorrt-rtx]'",
    "tifffile": "pip install 'saae[dev]'",
    "timm": "pip install 'saae[train]'",
    "uv": "pip install 'saae[dev]'",
    "uvicorn": "pip install 'saae[serve]'",
    "torch": "pip install 'saae[train]'",
    "tritonclient": "pip install 'saae[triton]'",
    "watchdog": "pip install 'saae[watch]'",
    "yaml": "pip install 'saae[train]'",
    "zensical": "pip install 'saae[docs]'",
}
"""What a test may do without: module -> how to install it. Everything else that is missing is an error."""


def _library(module: str) -> str | None:
    """The library of the table that a module is part of: `cuda.bindings.runtime` is part of `cuda.bindings`."""
    return next((name for name in LIBRARIES if f"{module}.".startswith(f"{name}.")), None)


def need(module: str) -> Any:
    """Imports a module of an optional library and returns it; skips the test where the library is not installed."""
    library = _library(module)
    assert library is not None, f"{module} is not in the table of optional libraries"
    return pytest.importorskip(module, reason=f"needs {library}: {LIBRARIES[library]}")


class _Module(pytest.Module):
    """A file of tests that is skipped, not an error, where one of its folder's optional libraries is not installed."""

    optional: frozenset[str] = frozenset()

    def collect(self) -> Iterator[Any]:
        try:
            yield from super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            # A missing parent package is told by its own name: "cuda" for cuda.bindings.
            missing = cause.name if isinstance(cause, ModuleNotFoundError) and cause.name else ""
            library = _library(missing) or next((name for name in LIBRARIES if name.startswith(f"{missing}.")), None)
            if not missing or library not in self.optional:
                raise
            pytest.skip(f"{self.nodeid} needs {library}: {LIBRARIES[library]}", allow_module_level=True)


def skips_without(*libraries: str) -> Callable[[Path, pytest.Collector], pytest.Module]:
    """The hook `pytest_pycollect_makemodule` of a folder whose files may lack these libraries at import."""
    assert set(libraries) <= set(LIBRARIES), set(libraries) - set(LIBRARIES)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
        module = _Module.from_parent(parent, path=module_path)
        module.optional = frozenset(libraries)
        return module

    return pytest_pycollect_makemodule
