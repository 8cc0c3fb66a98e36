"""A CUDA graph's stand-in on the CPU: notes what PyTorch's dispatcher is asked for and plays exactly that back.

Playing back runs no line of the recorded Python: the noted operations of ATen are called with the noted tensors and
numbers, and their results copied into the noted result tensors. So a number that Python took while recording stays as
it was, as in a CUDA graph. As there, recording changes nothing, and reading a number back is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS_BACK = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item", "unique2", "masked_select"}


class Tape(TorchDispatchMode):
    """Notes operations; `undo` brings back the memory that was there before."""

    def __init__(self, refuse_at: int | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []
        self.names: list[str] = []
        self._refuse_at = refuse_at
        self._before: dict[int, tuple[Any, Any]] = {}
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation, notes it if it computes, and keeps a copy of the memory that it may write to."""
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in READS_BACK or len(self.names) == self._refuse_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.names.append(name)
        given = {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            given[storage._cdata] = storage
            # Whatever is touched, not only what the schema admits to: that of BatchNorm keeps quiet.
            if storage._cdata not in self._made and storage._cdata not in self._before:
                self._before[storage._cdata] = (storage, storage.clone())
        found = func(*args, **kwargs)
        results: list[Tensor | None] = []
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata in given:
                results.append(None)  # a view, or what was written in place
            else:
                self._made[storage._cdata] = storage
                results.append(tensor)
        if func._schema.is_mutable or any(result is not None for result in results):
            self.calls.append((func, args, kwargs, results))
        return found

    def undo(self) -> None:
        """As if nothing had been executed."""
        for storage, content in self._before.values():
            storage.copy_(content)

    def play(self) -> None:
        """The noted operations, on the noted tensors."""
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                found = _tensors(func(*args, **kwargs))
                assert len(found) == len(results)
                for old, new in zip(results, found, strict=True):
                    if old is not None:
                        old.copy_(new)


class FakeRecorder:
    """A `saae_train.fitting.cuda_graph.Recorder`.

    Args:
        refuse_at: so many operations into a recording it is refused; None: never.
    """

    def __init__(self, refuse_at: int | None = None) -> None:
        self.refuse_at = refuse_at
        self.tape: Tape | None = None
        self.warmed_up = self.recorded = self.replayed = 0

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs it."""
        assert self.tape is None
        self.warmed_up += 1
        return step()

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Notes it, and undoes it."""
        self.recorded += 1
        tape = Tape(self.refuse_at)
        try:
            with tape:
                result = step()
        finally:
            tape.undo()
        self.tape = tape
        return result

    def replay(self) -> None:
        """Plays it back."""
        assert self.tape is not None
        self.replayed += 1
        self.tape.play()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
