"""The first process of a container: run a service, forward signals, and touch a file while the service lives.

    python supervise.py [--alive FILE] [--seconds 30] -- COMMAND...
    python supervise.py --check [--alive FILE] [--seconds 30]

A service that speaks systemd's protocol (`saae-line run` does) reports to its service manager that it lives, as long as
its threads make progress. A container has no service manager; this script receives the reports, and `--check` is the
container's health check: 0 if the last report is at most `--seconds` old, else 1. It ends with the service's exit code.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

ALIVE = Path("/tmp/saae/alive")


def run(command: Sequence[str], alive: Path, seconds: float) -> int:
    """Run a command until it ends; return its exit code, 128 and its signal's number where one ended it."""
    try:
        alive.parent.mkdir(parents=True, exist_ok=True)
        alive.touch()
        alive.unlink()
        tempfile.gettempdir()  # may be written, too
    except OSError as error:
        sys.exit(f"supervise.py: {error}. A read-only root needs --tmpfs /tmp.")
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        place = str(Path(folder) / "notify")
        listener.bind(place)
        environment = {**os.environ, "NOTIFY_SOCKET": place, "WATCHDOG_USEC": str(int(seconds * 1e6))}
        handed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        signal.pthread_sigmask(signal.SIG_BLOCK, handed)  # none is lost while the service starts
        service = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, handed),
            start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is handed on once
        )

        def hand_on(number: int, _: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                service.send_signal(number)

        for number in handed:
            signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handed)
        while service.poll() is None:
            ready, _, _ = select.select([listener], [], [], 0.2)
            if ready and any(line in (b"READY=1", b"WATCHDOG=1") for line in listener.recv(4096).split(b"\n")):
                alive.touch()
            _reap(service.pid)
    alive.unlink(missing_ok=True)
    code = service.returncode
    return 128 - code if code < 0 else code


def _reap(service: int) -> None:
    """Reap orphaned processes: in a container, the first process is the parent of all of them."""
    with suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid == service:
                return
            os.waitpid(found.si_pid, os.WNOHANG)


def is_alive(alive: Path, seconds: float) -> bool:
    """Whether the last report is recent enough."""
    try:
        return time.time() - alive.stat().st_mtime < seconds
    except OSError:
        return False


def main() -> None:
    """Run the service, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--alive", type=Path, default=ALIVE)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("command", nargs="*")
    chosen = parser.parse_args()
    if chosen.check:
        sys.exit(0 if is_alive(chosen.alive, chosen.seconds) else 1)
    if not chosen.command:
        parser.error("no command: supervise.py -- saae-line run line.toml")
    sys.exit(run(chosen.command, chosen.alive, chosen.seconds))


if __name__ == "__main__":
    main()
