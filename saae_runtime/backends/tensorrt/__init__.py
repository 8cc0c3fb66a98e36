"""TensorRT: standard, RTX and lean."""

from .choose import candidates, open_backend

__all__ = ["candidates", "open_backend"]
