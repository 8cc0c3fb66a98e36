"""Graphs that this run has exported before: PyTorch's exporter takes seconds, and of one module it makes one graph."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import onnx
import torch
from filelock import FileLock

__all__ = ["module_digest", "once"]

Trace = Callable[[Any], onnx.ModelProto]


class _Pickler(pickle.Pickler):
    """Writes all that a module is made of, the same in every process: no addresses, and sets in order."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().view(torch.uint8) if value.ndim else value.detach().clone()
            return tuple, ((str(value.dtype), tuple(value.shape), data.numpy().tobytes()),)
        if isinstance(value, torch.nn.Module):
            kind = type(value)
            facts = [(name, sorted(held) if isinstance(held, set) else held) for name, held in vars(value).items()]
            return tuple, ((kind.__module__, kind.__qualname__, facts),)
        return NotImplemented


def module_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's classes, attributes and weights."""
    text = io.BytesIO()
    pickler = _Pickler(text)
    pickler.fast = True  # every value in full: whether two are one object says nothing
    pickler.dump(module)
    return hashlib.sha256(text.getvalue()).hexdigest()


def once(trace: Trace, folder: Path) -> Trace:
    """The exporter `trace`, asked once for each module by all processes that share `folder`."""

    @wraps(trace)
    def traced(graph: Any) -> onnx.ModelProto:
        file = folder / f"{module_digest(graph.eval())}.onnx"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                model = trace(graph)
                part = file.with_suffix(".part")
                onnx.save(model, part)
                part.replace(file)
        return onnx.load(file)

    return traced
