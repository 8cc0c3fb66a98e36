"""Jobs in fresh processes: several at once, begun again where one dies, ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fake_jobs
import pytest
from needs import need

from saae_runtime.errors import FitError, SaaeError
from saae_train.cli import workers
from saae_train.experiments.jobs import Job, Jobs, Processes, Task, Workers


def run(where: Workers, *tasks: tuple[Task, Any]) -> tuple[dict[int, Mapping[str, Any] | SaaeError], list[Any]]:
    """Runs tasks; what each gave by its place, and what was told on the way."""
    told: list[Any] = []
    found: dict[int, Mapping[str, Any] | SaaeError] = {}
    left = list(enumerate(tasks))
    with Jobs(where, lambda job, why: told.append((job.name, why))) as jobs:
        while left or jobs.keys:
            while left and jobs.has_room:
                place, (task, argument) = left.pop(0)
                jobs.begin(place, Job(f"job {place}", task, argument), lambda *now: told.append(now))
            place, outcome = jobs.next()
            assert place not in found
            found[place] = outcome
    return found, told


@pytest.mark.parametrize(
    ("named", "expected"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-5e, MIG-7", ["GPU-5e", "MIG-7"])]
)
def test_jobs_get_the_gpus_that_the_user_named(
    monkeypatch: pytest.MonkeyPatch, named: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(need("torch").cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert workers._gpus() == expected


def test_several_run_at_once_and_take_turns_at_the_gpus(tmp_path: Path) -> None:
    found, told = run(Processes(2, gpus=(4, 7)), *[(fake_jobs.together, str(tmp_path))] * 2)
    assert {outcome["number"] for outcome in found.values()} == {0, 1}  # type: ignore[index]
    assert {outcome["gpu"] for outcome in found.values()} == {"4", "7"}  # type: ignore[index]
    assert {("there", 0, 2), ("there", 1, 2)} <= set(told)


def test_one_at_a_time_each_has_a_process_of_its_own_and_its_threads(tmp_path: Path) -> None:
    found, _ = run(Processes(1, threads=3), *[(fake_jobs.surroundings, "")] * 2)
    assert len({os.getpid(), *(outcome["pid"] for outcome in found.values())}) == 3  # type: ignore[index]
    assert {outcome["OMP_NUM_THREADS"] for outcome in found.values()} == {"3"}  # type: ignore[index]
    assert os.environ["OMP_NUM_THREADS"] != "3"


def test_one_whose_process_dies_is_begun_again_and_the_others_go_on(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("once", "always")]
    for folder in folders:
        folder.mkdir()
    tasks = [(fake_jobs.dies, (str(folders[0]), 1)), (fake_jobs.dies, (str(folders[1]), 99)), (fake_jobs.fails, None)]
    tasks.append((fake_jobs.raises, None))
    found, told = run(Processes(2), *tasks)
    assert found[0] == {"attempts": 2}
    assert isinstance(found[1], SaaeError)
    assert found[1].what == "The process of job 1 ended with code -9, 3 times."
    assert fake_jobs.attempts(folders[1]) == 3
    assert isinstance(found[2], FitError)  # what fails in words would fail again
    assert (found[2].what, found[2].why, found[2].cure) == ("The loss became nan.", "Too fast.", "slower")
    assert isinstance(found[3], SaaeError)
    assert found[3].what == "RuntimeError: out of memory"
    assert "fake_jobs.py" in found[3].why
    assert sorted(told) == [("job 0", "ended with code -9"), *[("job 1", "ended with code -9")] * 2]


def test_no_process_outlives_the_one_that_waits_for_it(tmp_path: Path) -> None:
    """Killed with its parent: it stops as by Ctrl-C, which is when a fit saves its state."""
    program = (
        "import sys, fake_jobs; from saae_train.experiments.jobs import Job, Jobs, Processes\n"
        "if __name__ == '__main__':\n"
        "    jobs = Jobs(Processes())\n"
        "    jobs.begin(0, Job('one', fake_jobs.endless, sys.argv[1]), print)\n"
        "    jobs.next()\n"
    )
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join(word for word in sys.path if word)
    words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    parent = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})
    wait_for(tmp_path / "begun")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "stopped")


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def test_what_is_in_work_at_the_end_is_stopped_in_order(tmp_path: Path) -> None:
    with Jobs(Processes(2, grace=0.0)) as jobs:
        jobs.begin(0, Job("one", fake_jobs.endless, str(tmp_path)), print)
        wait_for(tmp_path / "begun")
    assert (tmp_path / "stopped").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)


def test_ctrl_c_while_waiting_stops_what_is_in_work_in_order(tmp_path: Path) -> None:
    """The signal goes to this process alone."""

    def stop() -> None:
        wait_for(tmp_path / "begun")
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=stop)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Processes(grace=0.2), (fake_jobs.endless, str(tmp_path)))
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "stopped").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)
