"""Video files through PyAV and OpenCV, whole and damaged; cameras through a stand-in for OpenCV."""

from __future__ import annotations

import json
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle
from typer.testing import CliRunner

from saae_runtime.cli import command as cli
from saae_runtime.errors import ConfigError, DataError, DeviceError
from saae_runtime.sources import video
from saae_runtime.sources.files import find_sources, read_frames

GRAYS = (20, 70, 120, 170, 220, 90)


def film(path: Path, grays: tuple[int, ...] = GRAYS) -> Path:
    av = need("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = 1  # every frame whole, so that damage to one does not reach the next
        noise = np.random.default_rng(0)  # keeps the frames from compressing to less than the file's header
        for gray in grays:
            picture = (gray + noise.integers(-15, 16, (48, 64, 3))).astype(np.uint8)
            picture[:, :32, 0] = 255  # red on the left: a swap of channels or sides shows
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(params=["av", "cv2"])
def library(request, monkeypatch) -> str:
    need(request.param)
    found = video.find_spec
    monkeypatch.setattr(video, "find_spec", lambda name: found(name) if name == request.param else None)
    assert video.check_video() == request.param
    return request.param


def test_frames_come_in_order_as_rgb(tmp_path: Path, library: str) -> None:
    path = film(tmp_path / "line.mp4")
    frames = list(read_frames(find_sources([str(path)])))
    assert [frame.index for frame in frames] == list(range(len(GRAYS)))
    assert [str(frame.stem) for frame in frames[:2]] == ["line/000000", "line/000001"]
    for frame, gray in zip(frames, GRAYS, strict=True):
        assert frame.image is not None
        assert frame.image.shape == (48, 64, 3)
        right = frame.image[8:40, 44:60].reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(right, gray, atol=8)
        left = frame.image[8:40, 4:20].reshape(-1, 3).mean(axis=0)
        assert left[0] > left[2] + 20, "red is the first channel"
    assert find_sources([str(path)])[0].count() == len(GRAYS)


def test_cut_off_film_gives_what_it_holds_and_says_so(tmp_path: Path, library: str) -> None:
    path = film(tmp_path / "line.avi", GRAYS * 4)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * len(whole) // 3])
    items = list(video.video_frames(path))
    good = [item for item in items if isinstance(item, np.ndarray)]
    assert 0 < len(good) < 24
    assert np.abs(good[0][8:40, 44:60].astype(float) - GRAYS[0]).mean() < 8
    assert any(isinstance(item, DataError) for item in items), "a cut must not pass for the end"


def test_no_film_at_all_is_one_error(tmp_path: Path, library: str) -> None:
    path = tmp_path / "line.mp4"
    path.write_bytes(b"this is no film" * 100)
    (item,) = video.video_frames(path)
    assert isinstance(item, DataError)
    assert str(path) in item.what
    assert item.cure
    assert video.frame_count(path) is None


def test_film_of_sound_alone_is_named(tmp_path: Path) -> None:
    av = need("av")
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (item,) = video.video_frames(path)
    assert isinstance(item, DataError)
    assert "no video stream" in item.what


def test_library_that_cannot_be_loaded_is_said(monkeypatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(video, "find_spec", lambda name: object() if name == "cv2" else None)
    monkeypatch.setattr(video.importlib, "import_module", broken)
    with pytest.raises(ConfigError, match=r"libGL\.so\.1") as caught:
        video.check_video()
    assert "opencv-python-headless" in caught.value.cure


@pytest.mark.needs("cv2")
def test_camera_that_is_not_there(tmp_path: Path) -> None:
    if Path("/dev/video97").exists():
        pytest.skip("this machine has a camera of that number")
    with pytest.raises(DeviceError) as caught:
        next(video.camera_frames(97))
    assert "camera:97" in caught.value.what
    assert caught.value.cure


class FakeCamera:
    """OpenCV's VideoCapture as far as it is used: `script` says which reads give a frame; after it, none does."""

    script: tuple[bool, ...] = ()
    there = True
    picture = np.zeros((4, 4, 3), np.uint8)

    def __init__(self, index: int) -> None:
        self.reads = iter(self.script)
        self.opened.append(index)

    def isOpened(self) -> bool:
        return self.there

    def set(self, *_: object) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        good = next(self.reads, False)
        return good, self.picture if good else None

    def release(self) -> None:
        self.released.append(True)


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> type[FakeCamera]:
    """A cv2 module with one camera, whether or not the real one is installed."""
    kind = type("Capture", (FakeCamera,), {"opened": [], "released": []})
    module = types.ModuleType("cv2")
    module.VideoCapture = kind  # type: ignore[attr-defined]
    module.CAP_PROP_BUFFERSIZE, module.COLOR_BGR2RGB = 38, 4  # type: ignore[attr-defined]
    module.cvtColor = lambda picture, _: np.ascontiguousarray(picture[..., ::-1])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cv2", module)
    found = video.find_spec
    monkeypatch.setattr(video, "find_spec", lambda name: object() if name == "cv2" else found(name))
    return kind


def test_camera_that_fails_is_reported_once_and_then_given_up(camera: type[FakeCamera]) -> None:
    camera.picture = np.zeros((4, 4, 3), np.uint8)
    camera.picture[..., 0] = 200  # blue, as OpenCV orders channels
    camera.script = (True, False, True)
    frames = video.camera_frames(0)
    first = next(frames)
    assert isinstance(first, np.ndarray)
    np.testing.assert_array_equal(first[0, 0], [0, 0, 200])
    assert isinstance(next(frames), DeviceError)
    assert isinstance(next(frames), np.ndarray)
    assert isinstance(next(frames), DeviceError)
    with pytest.raises(DeviceError, match="stopped giving frames"):
        next(frames)
    assert camera.released == [True]  # type: ignore[attr-defined]


@pytest.mark.needs("onnxruntime")
def test_a_camera_on_the_command_line(camera: type[FakeCamera], tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    camera.picture = gray_frame(spot=(10, 20, 9, 14))
    camera.script = (True, False, *[True] * 100)
    done = CliRunner().invoke(cli.app, [str(bundle), "camera:3", "--json", "-", "--limit", "4"])
    assert done.exit_code == 1
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["source"], record["frame"]) for record in records] == [("camera:3", index) for index in range(4)]
    assert [record.get("is_anomalous") for record in records] == [True, None, True, True]
    assert "camera:3 gave no frame" in done.stderr
    assert camera.opened == [3]  # type: ignore[attr-defined]
    assert camera.released == [True]  # type: ignore[attr-defined]
    camera.there = False
    done = CliRunner().invoke(cli.app, [str(bundle), "camera:3"])
    assert done.exit_code == 2
    assert "camera:3 cannot be opened" in done.stderr


def test_film_held_sideways_comes_upright(tmp_path: Path, library: str) -> None:
    path = film(tmp_path / "line.mp4")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # version, flags, times, id, duration, layer, volume (ISO 14496-12, 8.3.2)
    quarter_clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    assert struct.unpack_from(">9i", data, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, *quarter_clockwise)
    path.write_bytes(data)
    frame = next(video.video_frames(path))
    assert isinstance(frame, np.ndarray)
    assert frame.shape == (64, 48, 3)
    top, bottom = frame[4:20, 8:40].reshape(-1, 3).mean(axis=0), frame[44:60, 8:40].reshape(-1, 3).mean(axis=0)
    assert top[0] > top[2] + 20, "what was on the left is on top after a quarter turn clockwise"
    np.testing.assert_allclose(bottom, GRAYS[0], atol=8)
