"""Tasks for tests of jobs, in a module of their own, so that a fresh process can import them by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saae_runtime.errors import FitError
from saae_train.experiments.experiment import Experiment, run_experiment
from saae_train.experiments.jobs import Report
from saae_train.experiments.many import CategoryFit, fit_category


def attempt(folder: Path) -> int:
    """Notes that a task has begun there; how often before."""
    for number in range(100):
        try:
            (folder / f"attempt-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError


def attempts(folder: Path) -> int:
    """How often a task has begun there."""
    return len(list(folder.glob("attempt-*")))


def surroundings(folder: str, report: Report) -> Mapping[str, Any]:
    """What a task sees of its process."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SAAE_ALLOW_RANDOM")
    return {"pid": os.getpid(), "folder": str(Path.cwd()), **{name: os.environ.get(name) for name in names}}


def together(folder: str, report: Report) -> Mapping[str, Any]:
    """Ends when two of it are there at the same time, and fails where they never are."""
    number = attempt(Path(folder))
    end = time.monotonic() + 30
    while attempts(Path(folder)) < 2:
        if time.monotonic() > end:
            raise FitError("alone")
        time.sleep(0.02)
    report("there", number, 2)
    return {"number": number, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}


def dies(argument: tuple[str, int], report: Report) -> Mapping[str, Any]:
    """Is killed so many times, as by a system whose memory is full."""
    folder, times = argument
    number = attempt(Path(folder))
    if number < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"attempts": number + 1}


def fails(argument: Any, report: Report) -> Mapping[str, Any]:
    """Fails in words."""
    raise FitError("The loss became nan.", "Too fast.", "slower")


def raises(argument: Any, report: Report) -> Mapping[str, Any]:
    """What a library does that runs out of a device's memory."""
    raise RuntimeError("out of memory")


def endless(folder: str, report: Report) -> Mapping[str, Any]:
    """Goes on until it is stopped, and leaves a file when it is stopped as by Ctrl-C."""
    try:
        (Path(folder) / "begun").write_text(str(os.getpid()))
        while True:
            time.sleep(0.05)
    except KeyboardInterrupt:
        (Path(folder) / "stopped").touch()
        raise


def waits(folder: str, report: Report) -> Mapping[str, Any]:
    """Notes its parent, and waits until it may end."""
    number = attempt(Path(folder))
    (Path(folder) / f"parent-{number}").write_text(str(os.getppid()))
    end = time.monotonic() + 60
    while not (Path(folder) / "go").exists():
        if time.monotonic() > end:
            raise FitError("nobody said so")
        time.sleep(0.05)
    return {"number": number}


def fit_killed_once(wanted: CategoryFit, report: Report) -> Mapping[str, Any]:
    """`fit_category`, killed the first time, in the middle of the fit."""
    return fit_category(wanted, _killing(wanted.folder, report))


def measure_killed_once(experiment: Experiment, report: Report) -> Mapping[str, Any]:
    """`run_experiment`, killed the first time, in the middle of the fit."""
    return run_experiment(experiment, report=_killing(Path(str(experiment.cache)), report))


def _killing(folder: Path, report: Report) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    first = attempt(folder) == 0

    def watch(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if first and "loss" in what:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch
