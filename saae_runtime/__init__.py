"""Runs anomaly segmentation bundles: numpy and one inference library, no PyTorch."""

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
    "open_bundle",
]
