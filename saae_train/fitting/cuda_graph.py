"""A training step captured as a CUDA graph on a GPU: one launch in place of a few hundred."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["EAGER_STEPS", "Captured", "CudaRecorder", "Recorder", "recorder_for"]

EAGER_STEPS = 3
"""Steps before the capture: they allocate what is made once (moments, library handles, workspaces)."""

Step = Callable[[], Tensor]
"""A step: reads and writes tensors in place, has no branch on values read back, and returns a scalar."""


class Recorder(Protocol):
    """Captures a step on a device and replays it."""

    def warm_up(self, step: Step) -> Tensor:
        """Run the step eagerly, on the stream on which it will be captured."""

    def record(self, step: Step) -> Tensor:
        """Capture the step's operations without executing them; return the tensor that a replay writes its result to.

        Raises:
            RuntimeError: it cannot be captured.
        """

    def replay(self) -> None:
        """Run the captured operations on the same tensors."""


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder for the device; None on a CPU."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """A CUDA graph. The capture and the steps before it use a separate stream, which capturing needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, step: Step) -> Tensor:
        """See `Recorder`."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # Adam warns if it was not made capturable.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            found = step()
        here.wait_stream(self._stream)
        return found

    def record(self, step: Step) -> Tensor:
        """See `Recorder`."""
        try:
            # The outer block restores the stream if a failed capture does not. `thread_local`: what other threads
            # of the program do meanwhile does not spoil it.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                return step()
        except BaseException:
            self._graph = torch.cuda.CUDAGraph()  # frees the memory of the failed capture
            raise

    def replay(self) -> None:
        """See `Recorder`."""
        self._graph.replay()


class Captured:
    """A step that runs eagerly a few times, then is captured and replayed.

    If it cannot be captured it is always run eagerly; a failed capture has executed nothing.

    Args:
        step: see `Step`.
        recorder: None: every call runs the step eagerly.
        say: called once if the capture failed.

    Attributes:
        replayed: calls that were replayed.
    """

    def __init__(self, step: Step, recorder: Recorder | None, say: Callable[[str], None]) -> None:
        self._step, self._recorder, self._say = step, recorder, say
        self._to_warm_up = EAGER_STEPS
        self._result: Tensor | None = None
        self.replayed = 0

    def __call__(self) -> Tensor:
        """Run or replay one step; return its result in a tensor of its own."""
        if self._recorder is not None and self._to_warm_up:
            self._to_warm_up -= 1
            return self._recorder.warm_up(self._step)
        if self._recorder is not None and self._result is None:
            try:
                self._result = self._recorder.record(self._step)
            except RuntimeError as error:  # any CUDA error, also too little memory
                self._recorder = None
                self._say(f"the step cannot be captured as a CUDA graph, so it goes on without: {_reason(error)}")
        if self._recorder is None or self._result is None:
            return self._step()
        self._recorder.replay()
        self.replayed += 1
        return self._result.clone()  # the next replay writes over it


def _reason(error: BaseException) -> str:
    """First line of the error that ended a capture, not of a follow-up error. Raises a KeyboardInterrupt again."""
    while error.__context__ is not None:
        error = error.__context__
    if not isinstance(error, Exception):
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0]
