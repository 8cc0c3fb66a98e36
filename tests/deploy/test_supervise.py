"""The first process of the container: signals, exit codes, and the health check follow the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "supervise.py"

SERVICE = """
import os, signal, socket, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
place.connect(os.environ["NOTIFY_SOCKET"])
assert float(os.environ["WATCHDOG_USEC"]) > 0
place.send(b"READY=1\\nSTATUS=one station")
print("ready", flush=True)
until = time.monotonic() + float(sys.argv[1])
while True:
    if time.monotonic() < until:
        place.send(b"WATCHDOG=1")
    time.sleep(0.05)
"""


def supervised(alive: Path, *command: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(SCRIPT), "--alive", str(alive), "--seconds", "1", "--", *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def check(alive: Path, seconds: float = 1) -> int:
    words = [sys.executable, str(SCRIPT), "--check", "--alive", str(alive), "--seconds", str(seconds)]
    return subprocess.run(words, check=False).returncode


def wait_for(found: int, alive: Path) -> None:
    end = time.monotonic() + 20
    while check(alive) != found:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_healthy_as_long_as_the_service_says_so(tmp_path: Path) -> None:
    alive = tmp_path / "run" / "alive"
    assert check(alive) == 1
    process = supervised(alive, sys.executable, "-c", SERVICE, "600")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_for(0, alive)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7  # the service's own
        assert check(alive, 600) == 1
    finally:
        process.kill()


COUNTING = """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.05)
time.sleep(1.0)
sys.exit(10 * len(got) + got[0])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_key_of_the_terminal_reaches_the_service_once(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, str(SCRIPT), "--alive", str(tmp_path / "alive"), "--", sys.executable, "-c", COUNTING]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)  # two signals at once would be taken as one
        os.killpg(process.pid, number)  # as a terminal does
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 10 + number
    finally:
        process.kill()


def test_a_service_that_falls_silent_is_not_healthy(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    process = supervised(alive, sys.executable, "-c", SERVICE, "0.1")
    try:
        wait_for(0, alive)
        wait_for(1, alive)
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("import sys; sys.exit(4)", 4), ("import os; os.kill(os.getpid(), 9)", 128 + 9), ("pass", 0)],
)
def test_it_ends_with_the_services_exit_code(tmp_path: Path, code: str, expected: int) -> None:
    assert supervised(tmp_path / "alive", sys.executable, "-c", code).wait(20) == expected


def test_without_a_command_it_says_so(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, SCRIPT], capture_output=True, check=False).returncode == 2


def test_where_it_may_not_write_it_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [sys.executable, SCRIPT, "--alive", tmp_path / "file" / "run" / "alive", "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "needs --tmpfs /tmp" in done.stderr
