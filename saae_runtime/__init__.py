"""Runs anomaly segmentation bundles: numpy and one inference library, no PyTorch."""

import os
from typing import Any

# ONNX Runtime from 1.29 on writes a device id and a database below the home folder and looks up a telemetry host.
# Switched off here, before the library is first imported, unless the user has set it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from .backends import BACKENDS, BackendOptions
from .bundle import Bundle, open_bundle
from .engine import Engine
from .errors import SaaeError
from .manifest import Manifest
from .result import Region, Result

__all__ = [
    "BACKENDS",
    "BackendOptions",
    "Bundle",
    "Engine",
    "Manifest",
    "Region",
    "Result",
    "SaaeError",
    "TritonEngine",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    """Import `TritonEngine` when it is first used."""
    if name == "TritonEngine":
        from .triton.engine import TritonEngine

        return TritonEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
