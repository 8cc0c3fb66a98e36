"""Commands in processes of their own, each forked from one that has imported their libraries already.

To import PyTorch and what a build needs beside it takes a process four seconds. `Forks` starts one that does so, and
runs `python -m MODULE ARGUMENTS` as its children, one after the other: each has its own folder, environment, streams,
signals and end, as if it had been started alone. As a program, this file is the process that forks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest


class Forked:
    """A running command; at the end of its block it is no more.

    Args:
        number: of its process.
        answers: where its exit code comes from.
    """

    def __init__(self, number: int, answers: IO[bytes]) -> None:
        self._number, self._answers = number, answers
        self._code: int | None = None

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""
        if self._code is None and select.select([self._answers], [], [], 0)[0]:
            self._code = int(self._answers.readline())
        return self._code

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self._code is None:
            self._code = int(self._answers.readline())
        return self._code

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self._number, number)


class Forks:
    """A process that has imported some modules and forks; see this file.

    Args:
        modules: what it imports.
        environment: of it, and so what the modules see when they are imported.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str]) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("this system does not fork")
        command = [sys.executable, __file__, *modules]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=dict(environment), bufsize=0, stdin=pipe, stdout=pipe)

    def begin(self, module: str, *arguments: str, log: Path, cwd: Path, env: Mapping[str, str]) -> Forked:
        """Begins a command; both of its streams go to the file `log`."""
        wanted = {"module": module, "arguments": arguments, "log": str(log), "cwd": str(cwd), "env": dict(env)}
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        log.touch()
        asked.write(json.dumps(wanted).encode() + b"\n")
        return Forked(int(answers.readline()), answers)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


def _serve(modules: list[str]) -> Mapping[str, object] | None:
    """Forks for every line that is asked for: to each fork it returns what it is to become, at the end None."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a module prints is no answer
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # else the first collection in a fork copies all of it
    gc.enable()
    for line in sys.stdin.buffer.raw:  # type: ignore[attr-defined]
        number = os.fork()
        if not number:
            os.close(answers)
            found: Mapping[str, object] = json.loads(line)
            return found
        os.write(answers, f"{number}\n".encode())
        os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])}\n".encode())
    return None


def _become(module: str, arguments: list[str], log: str, cwd: str, env: dict[str, str]) -> None:
    """Turns this process into the command."""
    written, nothing = os.open(log, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if _wanted := _serve(sys.argv[1:]):
        _become(**_wanted)  # type: ignore[arg-type]
