"""One artefact of a bundle: opened as it is calibrated and compared, and the default T in its file.

Needs neither PyTorch nor onnx.
"""

from __future__ import annotations

import os
from pathlib import Path

from saae_runtime.backends.onnxruntime.graph import with_default
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import ConfigError
from saae_runtime.files import write_bytes
from saae_runtime.manifest import IN_BF16, Artefact

__all__ = ["CPU", "OPENVINO", "open_artefact", "set_threshold", "with_threshold"]

CPU = "onnxruntime:cpu"
"""The backend that calibrates and compares what every machine can run."""

OPENVINO = "onnxruntime:openvino"
"""The backend that calibrates and compares what is computed in bf16: no other does."""


def open_artefact(bundle: Bundle, artefact: Artefact) -> Engine:
    """An engine that runs exactly this artefact.

    Raises:
        BackendError: it cannot run here.
    """
    backend = str(artefact.library)
    if artefact.kind == "onnx":
        backend = OPENVINO if artefact.precision in IN_BF16 else CPU
    return Engine(bundle.only(artefact), backend=backend, precision=artefact.precision, verify=False, cache=False)


def with_threshold(path: str | os.PathLike[str], threshold: float) -> bytes:
    """An exported file with another default threshold; nothing else changes.

    Raises:
        ConfigError: not a graph that `export_onnx` wrote.
    """
    try:
        return with_default(Path(path).read_bytes(), "threshold", threshold)
    except ValueError as error:
        raise ConfigError(f"{path} has no default threshold.", f"It was not exported by saae: {error}.", "") from error


def set_threshold(path: str | os.PathLike[str], threshold: float) -> None:
    """Replaces the default threshold of an exported file (atomically); nothing else changes.

    Raises:
        ConfigError: not a graph that `export_onnx` wrote.
        StorageError: the file could not be written.
    """
    write_bytes(path, with_threshold(path, threshold))
