"""A real RTSP server as a process of its own, for tests that freeze or kill it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SYSTEM_PYTHON = "/usr/bin/python3"


@contextmanager
def rtsp_server(repo_root: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and port."""
    if not shutil.which(SYSTEM_PYTHON):
        pytest.skip("needs the system's Python with GStreamer")
    command = [SYSTEM_PYTHON, str(repo_root / "tests/support/rtsp_server.py"), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        if not said.isdecimal():
            pytest.skip(
                "needs a GStreamer RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-ugly"
            )
        yield server, int(said)
    finally:
        server.kill()
        server.wait()
