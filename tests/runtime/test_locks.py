"""Locks between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

from saae_runtime.errors import ConfigError
from saae_runtime.locks import alone

HOLDING = """
import sys, time
from pathlib import Path
from saae_runtime.locks import alone
with alone(Path(sys.argv[1]), "A build", "wait"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path, repo_root: Path) -> None:
    need("fcntl")
    lock = tmp_path / "work" / ".lock"
    command = [sys.executable, "-c", HOLDING, str(lock)]
    with subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigError, match="A fit is already running") as caught, alone(lock, "A fit", "wait"):
            pass
        assert caught.value.cure == "wait"
        other.kill()
    for _ in range(2):
        with alone(lock, "A fit", "wait"):
            pass
