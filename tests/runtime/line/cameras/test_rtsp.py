"""Network streams against a real RTSP server: read, frozen, killed and back again."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rtsp_process import rtsp_server

from saae_runtime.errors import ConfigError
from saae_runtime.line.camera import NoFrameError
from saae_runtime.line.cameras.registry import open_camera
from saae_runtime.line.cameras.rtsp import without_password

pytestmark = pytest.mark.needs("av")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_that_freezes_or_dies_is_given_up_and_found_again(repo_root: Path) -> None:
    with rtsp_server(repo_root) as (server, port):
        camera = open_camera(f"rtsp://127.0.0.1:{port}/line", {"timeout": 1.0})
        try:
            shot = camera.grab(60)
            assert shot.frame.shape == (120, 160, 3)
            assert shot.frame[:, 5].mean() > 150  # the test picture begins with white
            assert shot.frame[20:60, 28:40].mean(axis=(0, 1)).argmin() == 2  # and goes on with yellow
            server.send_signal(signal.SIGSTOP)
            until(lambda: not camera.stats.connected)
            with suppress(NoFrameError):
                camera.grab(0.2)  # a frame that had come before may still be there
            with pytest.raises(NoFrameError, match="disconnected"):
                camera.grab(0.2)
            server.send_signal(signal.SIGCONT)
            until(lambda: camera.stats.connected)
            camera.grab(60)
            assert camera.stats.reconnects >= 1
            server.kill()
            server.wait()
            until(lambda: not camera.stats.connected)
            with rtsp_server(repo_root, port):
                until(lambda: camera.stats.connected)
                assert camera.grab(60).frame.shape == (120, 160, 3)
        finally:
            camera.close()


def test_an_address_where_nobody_answers_is_tried_again() -> None:
    """A listener that takes the connection and says nothing must not hold anything up."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        began = threading.active_count()
        camera = open_camera(f"rtsp://me:secret@127.0.0.1:{mute.getsockname()[1]}/line", {"timeout": 0.3})
        assert not camera.stats.connected
        assert "secret" not in camera.stats.last_error
        with pytest.raises(NoFrameError) as error:
            camera.grab(0.1)
        assert "secret" not in str(error.value)
        camera.close()
        until(lambda: threading.active_count() <= began)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"transport": "carrier pigeon"}, {"timeuot": 3}])
def test_options_that_are_none(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        open_camera("rtsp://127.0.0.1/line", options)


def test_passwords_are_not_shown() -> None:
    assert without_password("rtsp://me:p@ss@host:554/a@b") == "rtsp://host:554/a@b"
    assert without_password("rtsp://host/a") == "rtsp://host/a"
