"""Triggers that a line.toml names: their servers, their options, and what cannot be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from asyncua.sync import Client
from plc_client import Plc

from saae_runtime.errors import ConfigError, SaaeError
from saae_runtime.line.config import LineConfig, load_config
from saae_runtime.line.plc.trigger import PlcTrigger
from saae_runtime.line.view import Phase
from saae_runtime.line.wiring import SECTIONS, open_any_camera, open_trigger

pytestmark = pytest.mark.needs("pymodbus")

LINE = """
[line]
name = "line-1"
[[recipe]]
name = "gear"
bundle = "b"
[[recipe]]
name = "screw"
bundle = "b"
[[station]]
name = "top"
camera = "{camera}"
recipes = ["gear"]
trigger = "{trigger}"
verdict_timeout = 7.0
{more}
"""


def config(folder: Path, trigger: str = "free", camera: str = "stdin:4x4", more: str = "") -> LineConfig:
    path = folder / "line.toml"
    path.write_text(LINE.format(trigger=trigger, camera=camera, more=more))
    return load_config(path, {}, SECTIONS)


def opened(folder: Path, trigger: str, more: str) -> PlcTrigger | None:
    line = config(folder, trigger, more=more)
    return open_trigger(line, line.stations[0])


def test_both_servers_drive_one_handshake(tmp_path: Path) -> None:
    more = "[plc]\nresult_timeout = 33.0\nrecipe_numbers = { gear = 1, screw = 2 }"
    line = config(tmp_path, "modbus:127.0.0.1:0, opcua:127.0.0.1:0", more=more)
    trigger = open_trigger(line, line.stations[0])
    assert trigger is not None
    assert (trigger.verdict_timeout, trigger.result_timeout) == (7.0, 33.0)
    modbus, opcua = trigger.servers
    trigger.wait(0)
    plc = Plc(modbus.port)  # type: ignore[attr-defined]
    plc.trigger("A", recipe=2)  # a recipe of the line, but not of this station
    assert "refused" in plc.read().bits
    plc.release()
    plc.trigger("A", recipe=1)
    found = trigger.wait(10)
    assert found is not None
    assert (found.part_id, found.recipe) == ("A", "gear")
    with Client(opcua.url) as control:  # type: ignore[attr-defined]
        results = control.get_node("ns=2;s=VisionSystem.ResultManagement")
        assert results.call_method("2:GetLatestResult")[1] == "A"
    plc.close()
    trigger.close()
    trigger.close()
    assert trigger.view().phase is Phase.OFFLINE
    end = time.monotonic() + 30
    while any(server.alive for server in trigger.servers):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_free_stations_have_none(tmp_path: Path) -> None:
    line = config(tmp_path)
    assert open_trigger(line, line.stations[0]) is None


@pytest.mark.parametrize(
    ("trigger", "more", "message"),
    [
        ("profinet:1", "", "no trigger is named"),
        ("modbus:127.0.0.1:0,nothing", "", "no trigger is named"),
        ("modbus:127.0.0.1:x", "", "not an address"),
        ("modbus:127.0.0.1:0", "[plc]\nrecipe_numbers = { nut = 1 }", "no recipe is named"),
        ("free", "[plc]\nrecipe_numbers = { gear = 0 }", "from 1 to 65535"),
        ("free", "[plc]\nrecipe_numbers = { gear = 1, screw = 1 }", "different numbers"),
        ("free", "[plc]\nresult_timeout = 0", "above 0"),
        ("free", "[plc]\nresult_timout = 1", "did you mean"),
    ],
)
def test_what_cannot_be(tmp_path: Path, trigger: str, more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, trigger, more)


@pytest.mark.needs("harvesters")
def test_a_cameras_file_is_found_beside_the_lines(tmp_path: Path) -> None:
    line = config(tmp_path, camera="genicam:no/such.cti")
    with pytest.raises(SaaeError, match=str(tmp_path)):
        open_any_camera(line, line.stations[0])


def test_a_folder_that_is_not_there_is_no_camera(tmp_path: Path) -> None:
    line = config(tmp_path, camera="folder")
    with pytest.raises(SaaeError):
        open_any_camera(line, line.stations[0])
