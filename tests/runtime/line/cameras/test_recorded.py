"""Videos and piped frames: every frame once, in order, and a clear end."""

from __future__ import annotations

import os
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from needs import need

from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.line.camera import BadFrameError, EndOfFrames, NoFrameError
from saae_runtime.line.cameras.recorded import RawFrames
from saae_runtime.line.cameras.registry import is_camera, open_camera


def test_a_video_gives_every_frame_and_ends(tmp_path: Path) -> None:
    av = need("av")
    path = tmp_path / "part.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (40, 120, 200):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    camera = open_camera(str(path))
    assert not camera.live
    shots = [camera.grab(1) for _ in range(3)]
    assert [round(float(shot.frame.mean()) / 40) for shot in shots] == [1, 3, 5]
    assert [shot.name for shot in shots] == [f"{path}#{number}" for number in range(3)]
    with pytest.raises(EndOfFrames):
        camera.grab(1)
    camera.close()
    path.write_bytes(b"no video")
    with pytest.raises(BadFrameError, match="cannot be decoded"):
        open_camera(str(path)).grab(1)
    with pytest.raises(SaaeError):
        open_camera(str(tmp_path / "gone.mp4"))


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
        with pytest.raises(BadFrameError, match="within a frame"):
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
    for spec in ("genicam:a.cti#1", "pylon", "pylon:123", "rtsp://host/a", "camera:0", "a/b.MP4", "stdin:4x4"):
        assert is_camera(spec)
    for spec in ("folder", "watch:folder", "a.png", "pylonic"):
        assert not is_camera(spec)
