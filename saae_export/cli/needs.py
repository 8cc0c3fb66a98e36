"""Checks the libraries that fitting and exporting need."""

from __future__ import annotations

from saae_runtime.errors import ConfigError

__all__ = ["need_export"]


def need_export() -> None:
    """Raise an error that says what to install if only the runtime is installed.

    Raises:
        ConfigError: PyTorch, timm or a package of ONNX is missing.
    """
    missing = []
    for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"This command needs {', '.join(missing)}.",
            "Only the runtime is installed here.",
            "pip install 'saae[export]', or 'saae[demo]' with weights that need no network",
        )
