"""A training step captured as a CUDA graph on a GPU: one launch in place of a few hundred."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["EAGER_STEPS", "Captured", "CudaRecorder", "Recorder", "recorder_for"]

EAGER_STEPS = 3
"""Steps before the recording: they make what is made once (moments, library handles, workspaces)."""

Step = Callable[[], Tensor]
"""Reads and writes tensors that stay where they are, decides by no number read back, and returns a scalar."""


class Recorder(Protocol):
    """What records a step on a device and plays it back."""

    def warm_up(self, step: Step) -> Tensor:
        """Run the step, in the place where it will be recorded."""

    def record(self, step: Step) -> Tensor:
        """Note the step's operations and execute none; give the tensor that a replay leaves the result in.

        Raises:
            RuntimeError: it cannot be recorded.
        """

    def replay(self) -> None:
        """Run the operations again, on the very same tensors."""


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder for the device, None where there is none."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """A CUDA graph. Recording and what leads up to it have a stream of their own, which capturing needs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, step: Step) -> Tensor:
        """See `Recorder`."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            # Adam says that it need not have been prepared for this.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            found = step()
        here.wait_stream(self._stream)
        return found

    def record(self, step: Step) -> Tensor:
        """See `Recorder`."""
        try:
            # The outer block puts the stream back where a failed capture does not. `thread_local`: what other threads
            # of the program do meanwhile does not spoil it.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                return step()
        except BaseException:
            self._graph = torch.cuda.CUDAGraph()  # lets go of the memory of the one that came to nothing
            raise

    def replay(self) -> None:
        """See `Recorder`."""
        self._graph.replay()


class Captured:
    """A step that runs eagerly a few times, then is captured and replayed.

    Where it cannot be recorded it is run as it is on and on: recording executes nothing, so nothing has changed.

    Args:
        step: see `Step`.
        recorder: None: every call runs the step as it is.
        say: is told once where recording was refused.

    Attributes:
        replayed: calls that were replayed.
    """

    def __init__(self, step: Step, recorder: Recorder | None, say: Callable[[str], None]) -> None:
        self._step, self._recorder, self._say = step, recorder, say
        self._to_warm_up = EAGER_STEPS
        self._result: Tensor | None = None
        self.replayed = 0

    def __call__(self) -> Tensor:
        """Run or replay one step; returns its result in a tensor of its own."""
        if self._recorder is not None and self._to_warm_up:
            self._to_warm_up -= 1
            return self._recorder.warm_up(self._step)
        if self._recorder is not None and self._result is None:
            try:
                self._result = self._recorder.record(self._step)
            except RuntimeError as error:  # every refusal of CUDA's, too little memory included
                self._recorder = None
                self._say(f"the step cannot be captured as a CUDA graph, so it goes on without: {_reason(error)}")
        if self._recorder is None or self._result is None:
            return self._step()
        self._recorder.replay()
        self.replayed += 1
        return self._result.clone()  # the next replay writes over it


def _reason(error: BaseException) -> str:
    """The first line of what ended a recording, not of what ending it led to. Raises it where it is a Ctrl-C."""
    while error.__context__ is not None:
        error = error.__context__
    if not isinstance(error, Exception):
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0]
