"""ONNX Runtime: CPU, CUDA and TensorRT."""

from .choose import candidates, open_backend

__all__ = ["candidates", "open_backend"]
