"""ONNX Runtime: CPU, CUDA, TensorRT and OpenVINO."""

from .choose import candidates, open_backend

__all__ = ["candidates", "open_backend"]
