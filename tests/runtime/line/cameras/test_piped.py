"""Piped frames: every frame once, in order, and a clear end; and which names are cameras at all."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from line_parts import line_text, wait_until

from saae_runtime.errors import ConfigError
from saae_runtime.line.camera import BadFrameError, EndOfFrames, NoFrameError
from saae_runtime.line.cameras.piped import RawFrames
from saae_runtime.line.cameras.registry import is_camera, open_camera
from saae_runtime.line.config import load_config
from saae_runtime.line.wiring import SECTIONS, open_any_camera


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


def full(level: int) -> bytes:
    """A frame of 100 x 100 pixels: two of them and a bit fill a pipe."""
    return bytes([level]) * 30_000


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of standard input that another program writes to."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as stream:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        yield writer
        os.close(writer)


def write(camera: RawFrames, pipe: int, level: int) -> None:
    """A frame, until it has been read."""
    number = camera._number
    os.write(pipe, full(level))
    assert wait_until(lambda: camera._number == number + 1)


def test_a_triggered_part_gets_a_frame_that_began_after_its_trigger(pipe: int) -> None:
    camera = open_camera("stdin:100x100", triggered=True)
    assert isinstance(camera, RawFrames)
    for level in range(8):  # nobody asks for these, and the program that writes them does not wait
        write(camera, pipe, level)
    camera.trigger()
    write(camera, pipe, 10)
    assert camera.grab(10).frame[0, 0, 0] == 10
    write(camera, pipe, 11)
    os.write(pipe, full(12)[:10_000])
    assert wait_until(lambda: camera._position == 10 * 30_000 + 10_000)
    camera.trigger()  # within a frame
    os.write(pipe, full(12)[10_000:])
    with pytest.raises(NoFrameError):
        camera.grab(0.2)
    write(camera, pipe, 13)
    assert camera.grab(10).frame[0, 0, 0] == 13
    with camera._changed:  # written, but not read yet
        os.write(pipe, full(14))
        camera.trigger()
    assert wait_until(lambda: camera._position == 13 * 30_000)
    write(camera, pipe, 15)
    assert camera.grab(10).frame[0, 0, 0] == 15
    camera.close()


def test_frames_within_the_delay_after_a_trigger_are_for_no_part(pipe: int) -> None:
    camera = open_camera("stdin:100x100", {"delay": 0.3}, triggered=True)
    assert isinstance(camera, RawFrames)
    camera.trigger()
    triggered = time.monotonic()
    level = 0
    while camera._shot is None:
        level += 1
        began = time.monotonic()
        write(camera, pipe, level)
        assert level < 200
        time.sleep(0.01)
    assert time.monotonic() - triggered > 0.3
    assert began - triggered > 0.2
    assert camera.grab(10).frame[0, 0, 0] == level > 1
    camera.close()


@pytest.mark.parametrize("trigger", ["free", "modbus:127.0.0.1:0"])
def test_the_pipe_of_a_station_without_a_trigger_waits(pipe: int, tmp_path: Path, trigger: str) -> None:
    station = f'trigger = "{trigger}"'
    (tmp_path / "line.toml").write_text(line_text(Path("b"), camera="stdin:100x100", station=station))
    config = load_config(tmp_path / "line.toml", {}, SECTIONS)
    camera = open_any_camera(config, config.stations[0])
    os.write(pipe, full(1))
    assert camera.grab(10).frame[0, 0, 0] == 1
    for level in (2, 3):
        os.write(pipe, full(level))
    if trigger == "free":
        time.sleep(0.2)
    else:
        assert wait_until(lambda: camera._number == 3)
    assert camera.grab(10).frame[0, 0, 0] == (2 if trigger == "free" else 3)
    camera.close()


@pytest.mark.parametrize("value", [-1, "late", True])
def test_a_delay_is_a_number_of_seconds(value: object) -> None:
    with pytest.raises(ConfigError, match="delay"):
        open_camera("stdin:4x4", {"delay": value})
