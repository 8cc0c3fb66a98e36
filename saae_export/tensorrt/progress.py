"""Shows the builder's progress as bars, and lets Ctrl-C stop it cleanly."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from saae_runtime.backends.tensorrt.library import TrtLibrary

__all__ = ["BuildProgress"]


class BuildProgress:
    """Shows the phases of a build while it runs; `monitor` goes into the builder's configuration.

    Ctrl-C and SIGTERM set a flag that stops the builder at its next step; `check` raises the interrupt afterwards. An
    exception would not work: between the library and a callback, the library drops it.

    Args:
        library: the loaded flavour.
        console: where to draw; None draws nothing and still reacts to Ctrl-C.
    """

    def __init__(self, library: TrtLibrary, console: Console | None) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=console is None)
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}
        self._interrupt: BaseException | None = None
        self._handlers: dict[int, Any] = {}
        self.monitor = _make_monitor(library.module, self)

    def __enter__(self) -> BuildProgress:
        self._bars.start()
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._interrupt = self._interrupt or KeyboardInterrupt(signal.Signals(number).name)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            # None: set outside Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()
        self._bars.stop()

    def check(self) -> None:
        """Raise what interrupted the build, if anything did."""
        if self._interrupt is not None:
            raise self._interrupt

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins; `parent` is the one around it."""
        self._depth[phase] = self._depth.get(parent or "", -1) + 1
        self._tasks[phase] = self._bars.add_task("  " * self._depth[phase] + phase, total=steps)

    def step(self, phase: str, step: int) -> bool:
        """A step of a phase is done; False asks the builder to stop."""
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=step + 1)
        return self._interrupt is None

    def finish(self, phase: str) -> None:
        """A phase is over."""
        task = self._tasks.pop(phase, None)
        self._depth.pop(phase, None)
        if task is not None:
            self._bars.remove_task(task)

    def guard(self, call: Any, *arguments: Any) -> Any:
        """Run a callback; keep an exception for `check`, because the builder would drop it."""
        try:
            return call(*arguments)
        except BaseException as error:
            self._interrupt = self._interrupt or error
            return False


def _make_monitor(module: Any, progress: BuildProgress) -> Any:
    base = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]  # the base is known at run time only
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.guard(progress.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return bool(progress.guard(progress.step, phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            progress.guard(progress.finish, phase_name)

    return Monitor()
