"""Writes tensors as safetensors, with the system's errors."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["write_tensors"]


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, which may be on a device and share memory, to a file.

    Raises:
        OSError: the disk is full, or the place may not be written to.
    """
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    try:
        save_file(plain, file)
    except SafetensorError as error:
        told = re.search(r"os error (\d+)", str(error))  # the system's error number, in safetensors' text
        raise OSError(int(told[1]) if told else errno.EIO, str(error)) from error
