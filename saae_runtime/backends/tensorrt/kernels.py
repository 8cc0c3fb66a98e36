"""Keeps kernels that TensorRT for RTX compiles when an engine runs, for all contexts and the next process."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import SaaeError
from ...files import sha256_bytes, write_bytes
from .library import TrtLibrary

__all__ = ["KernelCache", "kernel_file"]


def kernel_file(engine_file: str, gpu_name: str) -> str:
    """File name for the kernels of one engine on one model of GPU."""
    plain = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return f"{engine_file.removesuffix('.engine')}-{plain}.kernels"


class KernelCache:
    """The compiled kernels of one engine. If the library compiles none, this does nothing.

    The library refuses kernels of a different release, driver or GPU; such a file is rewritten. A file that cannot be
    read or written only costs time, so it is not an error.

    Args:
        library: the loaded flavour.
        engine: the deserialized engine; the GPU's context is current.
        file: where the kernels are kept; None: only in memory, for the contexts of this engine.
    """

    def __init__(self, library: TrtLibrary, engine: Any, file: Path | None = None) -> None:
        self._library = library
        self._file = file
        self._kept = ""  # digest of the file
        self._used = False
        self.handle: Any = library.new_runtime_cache(engine)
        if self.handle is not None and file is not None:
            self._load(file)

    def context(self, engine: Any) -> Any:
        """A new execution context that uses these kernels and adds new ones.

        Raises:
            DeviceError: not created.
        """
        self._used = True
        return self._library.create_context(engine, self.handle)

    def save(self) -> None:
        """Write the kernels, if there may be new ones."""
        if self.handle is None or self._file is None or not self._used:
            return
        self._used = False
        found = self.handle.serialize()
        self._library.take_messages()
        if found is None:
            return
        data = bytes(memoryview(found))
        digest = sha256_bytes(data)
        if data and digest != self._kept:
            with suppress(SaaeError, OSError):
                write_bytes(self._file, data)
                self._kept = digest

    def close(self) -> None:
        """Release the library's object, after every context."""
        self.handle = None

    def _load(self, file: Path) -> None:
        try:
            data = file.read_bytes()
        except OSError:
            return
        if data and self.handle.deserialize(data):
            self._kept = sha256_bytes(data)
        self._library.take_messages()  # a refusal is logged there, and only means that they are compiled again
