"""Piped frames: every frame once, in order, and a clear end; and which names are cameras at all."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from saae_runtime.errors import ConfigError
from saae_runtime.line.camera import BadFrameError, EndOfFrames, NoFrameError
from saae_runtime.line.cameras.piped import RawFrames
from saae_runtime.line.cameras.registry import is_camera, open_camera


@pytest.mark.parametrize("channels", [3, 1])
def test_piped_frames_come_whole_whatever_the_pieces(channels: int) -> None:
    reader, writer = os.pipe()
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels)).astype(np.uint8)
    with os.fdopen(reader, "rb", buffering=0) as stream:
        camera = RawFrames(stream, (6, 7), channels)
        with pytest.raises(NoFrameError):
            camera.grab(0.01)
        data = frames.tobytes()
        os.write(writer, data[:10])
        with pytest.raises(NoFrameError):
            camera.grab(0.01)  # and keeps what has come

        def write() -> None:
            for start in range(10, len(data), 11):
                os.write(writer, data[start : start + 11])
            os.write(writer, b"rest")
            os.close(writer)

        thread = threading.Thread(target=write)
        thread.start()
        for frame in frames:
            found = camera.grab(30).frame
            assert np.array_equal(found, np.broadcast_to(frame, (6, 7, 3)))
            found[:] = 0  # its own memory
        with pytest.raises(BadFrameError, match="middle of a frame"):
            camera.grab(30)
        with pytest.raises(EndOfFrames):
            camera.grab(30)
        thread.join()
        assert (camera.stats.grabbed, camera.stats.bad) == (5, 1)


@pytest.mark.parametrize(
    "spec", ["stdin:", "stdin:0x5", "stdin:5x5:blue", "camera:x", "what:ever", "folder", "stdin:999999x999999"]
)
def test_names_that_mean_nothing_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        open_camera(spec)


def test_which_names_are_cameras() -> None:
    for spec in ("genicam:a.cti#1", "pylon", "pylon:123", "rtsp://host/a", "camera:0", "stdin:4x4"):
        assert is_camera(spec)
    for spec in ("folder", "watch:folder", "a.png", "a.mp4", "pylonic"):
        assert not is_camera(spec)
