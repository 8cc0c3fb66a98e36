"""OpenVINO: CPUs, Intel's GPUs and NPUs."""

from .choose import bf16_missing, candidates, open_backend

__all__ = ["bf16_missing", "candidates", "open_backend"]
