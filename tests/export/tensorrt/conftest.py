"""TensorRT for RTX, which builds engines without a GPU."""

from __future__ import annotations

import pytest
from needs import need

from saae_runtime.backends.tensorrt.library import TrtLibrary, load_library


@pytest.fixture(scope="session")
def rtx() -> TrtLibrary:
    """The library as the runtime loads it."""
    need("tensorrt_rtx")
    return load_library("tensorrt_rtx")
