"""The builder's progress: how an interrupt stops a build whose library drops exceptions of callbacks."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from saae_export.tensorrt.progress import BuildProgress


class IProgressMonitor:
    """TensorRT's base class of monitors."""


LIBRARY: Any = SimpleNamespace(module=SimpleNamespace(IProgressMonitor=IProgressMonitor))


def build(monitor: Any, steps: int, signalled_at: int, number: int) -> int:
    """A builder that drops what callbacks raise, as the library does; returns the steps that it made."""
    monitor.phase_start("building", None, steps)
    made = 0
    for step in range(steps):
        try:
            if step == signalled_at:
                signal.raise_signal(number)  # Python's handler runs here, between the library and the callback
            if not monitor.step_complete("building", step):
                break
        except BaseException:
            continue
        made += 1
    monitor.phase_finish("building")
    return made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 3, 9])
def test_an_interrupt_stops_the_builder_and_is_raised_afterwards(number: int, at: int) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with BuildProgress(LIBRARY, None) as progress:
        assert build(progress.monitor, 10, at, number) == at
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        progress.check()


def test_an_interrupt_after_the_last_step_is_raised_all_the_same() -> None:
    with BuildProgress(LIBRARY, None) as progress:
        assert build(progress.monitor, 10, 99, signal.SIGINT) == 10
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        progress.check()


def test_on_another_thread_no_handler_is_set() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with BuildProgress(LIBRARY, None) as progress:
            seen.append(signal.getsignal(signal.SIGINT))
            seen.append(build(progress.monitor, 4, 99, signal.SIGINT))
        progress.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [before, 4]
