"""GenICam cameras through harvesters, on the virtual producer that the genicam wheel carries."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from saae_runtime.errors import ConfigError
from saae_runtime.line.cameras.registry import open_camera

pytestmark = pytest.mark.needs("harvesters")


@pytest.fixture(scope="module")
def producer() -> str:
    """The virtual producer with three cameras: red, green, blue."""
    spec = find_spec("genicam")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "viky.cti"
    if not path.is_file():
        pytest.skip("this genicam wheel carries no virtual producer")
    return str(path)


def test_three_cameras_at_once_give_their_own_frames(producer: str) -> None:
    cameras = [open_camera(f"genicam:{producer}#{serial}") for serial in ("0", "1", "2")]
    try:
        for _ in range(3):
            shots = [camera.grab(20) for camera in cameras]
            for shot in shots:
                assert (shot.frame.shape, shot.frame.dtype) == ((400, 400, 3), np.uint8)
        # Each one has a colour of its own: what is not white or gray is mostly of one channel.
        tints = [shot.frame.reshape(-1, 3).astype(int) for shot in shots]
        main = [int((tint - tint.mean(axis=1, keepdims=True)).clip(0).sum(axis=0).argmax()) for tint in tints]
        assert sorted(main) == [0, 1, 2]
        assert all(camera.stats.connected and camera.stats.grabbed == 3 for camera in cameras)
        assert shots[2].name.startswith("genicam:viky.cti#2#")
    finally:
        for camera in cameras:
            camera.close()


def test_ctrl_c_still_goes_where_it_went(producer: str) -> None:
    """harvesters would take it, and end the camera in place of the program."""
    camera = open_camera(f"genicam:{producer}")
    try:
        assert camera.grab(20).frame.shape == (400, 400, 3)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        camera.close()


def test_it_is_opened_again_after_it_was_closed_and_as_gray(producer: str) -> None:
    for pixel_format in (None, "Mono8"):
        camera = open_camera(f"genicam:{producer}", {} if pixel_format is None else {"pixel_format": pixel_format})
        frame = camera.grab(20).frame
        assert frame.shape == (400, 400, 3)
        if pixel_format:
            assert np.array_equal(frame[:, :, 0], frame[:, :, 1])
        camera.trigger()  # it runs freely: only frames from now on count
        assert camera.grab(20).frame.shape == (400, 400, 3)
        camera.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger": "software"}, "cannot be triggered by software"),
        ({"pixel_format": "BayerRG8"}, "RGBa8"),
        ({"nodes": {"Nonsense": 1}}, "no node Nonsense"),
        ({"triger": "off"}, "Near: trigger"),
        ({"trigger": "sometimes"}, "off, software, hardware"),
        ({"buffer": 0}, "above 0"),
        ({"white_level": 3}, "white"),
    ],
)
def test_what_a_camera_cannot_do_is_said_at_once(producer: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_camera(f"genicam:{producer}", options)


def test_a_camera_that_is_not_there_is_looked_for(producer: str) -> None:
    camera = open_camera(f"genicam:{producer}#no-such-serial")
    assert not camera.stats.connected
    assert "is not there" in camera.stats.last_error
    camera.close()


def test_no_producer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such GenTL producer"):
        open_camera(f"genicam:{tmp_path / 'gone.cti'}")
    (tmp_path / "bad.cti").write_bytes(b"no library")
    with pytest.raises(ConfigError, match="not a GenTL producer"):
        open_camera(f"genicam:{tmp_path / 'bad.cti'}")
