"""A triggered line, end to end: a PLC triggers parts, an emulated Basler camera takes them, a bundle judges them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from needs import need
from plc_client import Plc
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.errors import ConfigError, DeviceError
from saae_runtime.line.camera import BadFrameError
from saae_runtime.line.cameras.reconnect import Device, LiveCamera
from saae_runtime.line.cameras.registry import open_camera
from saae_runtime.line.config import RecipeConfig, StationConfig
from saae_runtime.line.handshake import Handshake
from saae_runtime.line.part import Part, Verdict
from saae_runtime.line.plc.modbus import ModbusServer
from saae_runtime.line.recipes import RecipeBook
from saae_runtime.line.station import Station
from saae_runtime.line.view import Reason, Reply
from saae_runtime.render import save_png

pytestmark = pytest.mark.needs("pymodbus")

SIZE = (64, 96)
PARTS = 12


def is_good(number: int) -> bool:
    """Which of the pictures show a good part; no simple rhythm, so that a shift by one would be seen."""
    return number % 5 not in (1, 4)


@pytest.fixture
def sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options of an emulated camera that sees drawn parts, one after the other."""
    need("pypylon")
    monkeypatch.setenv("PYLON_CAMEMU", "1")
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(PARTS):
        spot = None if is_good(number) else (10, 20 + number, 8, 8)
        frame = gray_frame(SIZE, spot)
        frame[0, 0] = 128 + number  # which picture it is, far below the threshold
        save_png(folder / f"{number:02d}.png", frame)
    nodes = {
        "TestImageSelector": "Off",
        "ImageFileMode": "On",
        "ImageFilename": str(folder),
        "Width": SIZE[1],
        "Height": SIZE[0],
    }
    return {"trigger": "software", "pixel_format": "RGB8Packed", "nodes": nodes}


@pytest.fixture
def camera(sensor: dict[str, object]) -> Iterator[LiveCamera]:
    found = open_camera("pylon:", sensor)
    assert isinstance(found, LiveCamera)
    yield found
    found.close()


def test_each_trigger_is_one_picture(camera: LiveCamera) -> None:
    for number in range(4):
        camera.trigger()
        shot = camera.grab(20)
        assert shot.frame.shape == (*SIZE, 3)
        assert shot.frame[0, 0].tolist() == [128 + number] * 3
    assert (camera.stats.grabbed, camera.stats.reconnects) == (4, 0)


def test_a_broken_frame_is_one_part_without_a_picture(camera: LiveCamera) -> None:
    emulated = camera._device._camera  # type: ignore[union-attr]
    emulated.ForceFailedBufferCount.SetValue(1)
    emulated.ForceFailedBuffer.Execute()
    camera.trigger()
    with pytest.raises(BadFrameError, match="damaged"):
        camera.grab(20)
    camera.trigger()
    assert camera.grab(20).frame.shape == (*SIZE, 3)
    assert (camera.stats.bad, camera.stats.grabbed, camera.stats.reconnects) == (1, 1, 0)


def test_what_the_camera_does_not_take_is_said(sensor: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="RGB8Packed"):  # among those that it offers
        open_camera("pylon:", sensor | {"pixel_format": "RGB9"})
    with pytest.raises(ConfigError, match="no node Nonsense"):
        open_camera("pylon:", {"nodes": {"Nonsense": 1}})
    away = open_camera("pylon:no-such-serial", {})
    assert "is not there" in away.stats.last_error
    away.close()


def unplugged() -> Device:
    """In the place of connecting."""
    raise DeviceError("unplugged")


def test_parts_are_triggered_judged_and_acknowledged(
    camera: LiveCamera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_tiny_bundle(tmp_path / "gear", SIZE)
    book = RecipeBook([RecipeConfig("gear", str(bundle), backend="onnxruntime:cpu")], tmp_path)
    handshake = Handshake(verdict_timeout=60.0, result_timeout=600.0, recipes=book.names)
    records: list[tuple[Part, np.ndarray | None]] = []
    config = StationConfig("station", "pylon:", ("gear",), verdict_timeout=60.0, grab_timeout=60.0)
    station = Station(
        config, camera, book, lambda part, frame, result, recipe: records.append((part, frame)), source=handshake
    )
    server = ModbusServer(handshake, "127.0.0.1:0", recipes={7: "gear"})
    station.start()
    try:
        plc = Plc(server.port)
        for number in range(PARTS):
            plc.until("ready")
            plc.trigger(f"part-{number}", recipe=7)
            found = plc.until("valid")
            assert found.part == f"part-{number}"
            assert ("ok" in found.bits) == is_good(number)
            assert ("ng" in found.bits) != is_good(number)
            assert (found.reason, found.recipe) == (Reason.SCORE, 7)
            assert found.score == pytest.approx(127.0 if not is_good(number) else found.score)
            plc.acknowledge()
        # The camera is unplugged in the middle: a fault, in which no part is taken, until it is back.
        connect = camera._connect
        monkeypatch.setattr(camera, "_connect", unplugged)
        camera._device._camera.Close()  # type: ignore[union-attr]
        end = time.monotonic() + 30
        while camera.stats.connected:
            assert time.monotonic() < end
            time.sleep(0.01)
        found = plc.until("fault")
        assert found.bits & {"ready", "ok", "valid"} == set()
        plc.trigger("unplugged")
        found = plc.read()
        assert (found.part, found.refusal) == ("", Reply.FAULT)
        plc.release()
        monkeypatch.setattr(camera, "_connect", connect)
        assert "fault" not in plc.until("ready").bits
        plc.trigger("back")
        found = plc.until("valid")
        assert (found.part, found.reason) == ("back", Reason.SCORE)
        plc.acknowledge()
        plc.close()
    finally:
        station.stop()
        assert station.join(60)
        server.close()
        station.close()
        book.close()
    assert [part.part_id for part, _ in records] == [f"part-{number}" for number in range(PARTS)] + ["back"]
    for place, (part, frame) in enumerate(records):
        number = place if part.part_id != "back" else int(frame[0, 0, 0]) - 128  # type: ignore[index]
        assert part.verdict is (Verdict.OK if is_good(number) else Verdict.NG)
        assert frame is not None
        assert frame[0, 0, 0] == 128 + number  # the picture that this very trigger took


def test_a_killed_service_comes_back_without_the_verdict_it_had_given(tmp_path: Path, repo_root: Path) -> None:
    """The command itself, from its file: parts by Modbus, kill -9 with an OK in the registers, start, SIGTERM."""
    make_tiny_bundle(tmp_path / "gear", SIZE)
    (tmp_path / "parts").mkdir()
    for number in range(PARTS):
        save_png(tmp_path / f"parts/{number:02d}.png", gray_frame(SIZE, None if is_good(number) else (10, 20, 8, 8)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "line.toml").write_text(
        '[line]\nname = "line-1"\n[[recipe]]\nname = "gear"\nbundle = "gear"\nbackend = "onnxruntime:cpu"\n'
        f'[[station]]\nname = "top"\ncamera = "parts"\nrecipes = ["gear"]\ntrigger = "modbus:127.0.0.1:{port}"\n'
        "verdict_timeout = 60.0\n[plc]\nresult_timeout = 600.0\nrecipe_numbers = { gear = 7 }\n"
    )
    command = [sys.executable, "-m", "saae_runtime.line.cli", "run", "line.toml"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}

    def started() -> tuple[subprocess.Popen[bytes], Plc]:
        service = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        end = time.monotonic() + 120
        while True:
            try:
                return service, Plc(port, arm=False)
            except AssertionError:
                assert service.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)

    service, plc = started()
    try:
        plc.release()
        for number in range(3):
            plc.until("ready")
            plc.trigger(f"part-{number}", recipe=7)
            found = plc.until("valid")
            assert (found.part, "ok" in found.bits, found.recipe) == (f"part-{number}", is_good(number), 7)
            if number < 2:
                plc.acknowledge()
        assert "ok" in found.bits
        service.kill()
        service.wait()
        plc.close()
        service, plc = started()
        plc.until("ready")
        found = plc.read()
        assert (found.bits, found.part) == ({"ready", "online"}, "")
        plc.trigger("part-2")  # the bit was still set when the PLC found its way back
        found = plc.read()
        assert (found.part, found.refusal) == ("", Reply.NOT_ARMED)
        plc.release()
        plc.trigger("part-3")
        assert plc.until("valid").part == "part-3"
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    finally:
        service.kill()
        service.wait()
        plc.close()
