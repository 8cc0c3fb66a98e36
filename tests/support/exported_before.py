"""Graphs that this run has exported before: PyTorch's exporter takes seconds, and of one module it makes one graph.

It looks at no weight: modules that differ in their weights alone differ in the graph's initializers alone, until its
last step folds constants. So it is asked once for each architecture, and that last step once for each module.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from filelock import FileLock
from onnxscript import ir

__all__ = ["architecture_digest", "module_digest", "once"]

Trace = Callable[[Any], onnx.ModelProto]
Export = Callable[..., Any]


class _Pickler(pickle.Pickler):
    """Writes all that a module is made of, the same in every process: no addresses, and sets in order.

    Args:
        file: where to.
        weights: parameters and buffers whose values do not count, by their names.
    """

    def __init__(self, file: io.BytesIO, weights: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__(file)
        self.fast = True  # every value in full: whether two are one object says nothing
        self.names = {id(value): name for name, value in reversed((weights or {}).items())}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            facts: tuple[Any, ...] = (str(value.dtype), tuple(value.shape))
            if id(value) in self.names:
                return tuple, ((*facts, value.stride(), value.requires_grad, self.names[id(value)]),)
            data = value.detach().contiguous().view(torch.uint8) if value.ndim else value.detach().clone()
            return tuple, ((*facts, data.numpy().tobytes()),)
        if isinstance(value, torch.nn.Module):
            kind = type(value)
            held = [(name, sorted(held) if isinstance(held, set) else held) for name, held in vars(value).items()]
            return tuple, ((kind.__module__, kind.__qualname__, held),)
        return NotImplemented


def _digest(value: object, weights: dict[str, torch.Tensor] | None = None) -> str:
    text = io.BytesIO()
    _Pickler(text, weights).dump(value)
    return hashlib.sha256(text.getvalue()).hexdigest()


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have."""
    named = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: value for pairs in named for name, value in pairs}


def module_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's classes, attributes and weights."""
    return _digest(module)


def architecture_digest(module: torch.nn.Module, *more: object) -> str:
    """sha256 of a module's classes, attributes, the kinds of its weights, and `more`."""
    return _digest((module, more), _weights(module))


def _kept(file: Path, make: Callable[[], onnx.ModelProto]) -> Path:
    """The file, made unless another test has made it, in whatever process."""
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            model = make()
            part = file.with_suffix(".part")
            onnx.save(model, part)
            part.replace(file)
    return file


def _by_architecture(export: Export, folder: Path, module: torch.nn.Module, args: Any, **options: Any) -> Any:
    """`torch.onnx.export(..., optimize=True)`, with what it made of another module of this architecture."""
    assert options.pop("optimize"), "only its last step looks at weights"
    file = folder / f"{architecture_digest(module, args, repr(options))}.unoptimised.onnx"
    program = ir.load(_kept(file, lambda: export(module, args, optimize=False, **options).model_proto))
    for name, value in _weights(module).items():
        held = program.graph.initializers.get(name)
        if held is not None:
            tensor = ir.tensor(value.detach().contiguous().numpy(), name=name)
            assert (tensor.dtype, tensor.shape) == (held.dtype, held.shape), name
            held.const_value = tensor
    found = torch.onnx.ONNXProgram(program, None)
    found.optimize()
    return found


def once(trace: Trace, folder: Path) -> Trace:
    """The exporter `trace`, asked once for each module by all processes that share `folder`."""

    @wraps(trace)
    def traced(graph: Any) -> onnx.ModelProto:
        def make() -> onnx.ModelProto:
            with patch.object(torch.onnx, "export", partial(_by_architecture, torch.onnx.export, folder)):
                return trace(graph)

        return onnx.load(_kept(folder / f"{module_digest(graph.eval())}.onnx", make))

    return traced
