"""Files as cameras: one image at a time, each remembered when it has its record."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from line_parts import SINKS, ListTrigger, bad, good, line_text, wait_until
from PIL import Image
from typer.testing import CliRunner

from saae_runtime.appending import side_file
from saae_runtime.errors import DeviceError, StorageError
from saae_runtime.files import storage_error
from saae_runtime.line import camera_files
from saae_runtime.line.camera import BadFrameError, NoFrameError, Shot
from saae_runtime.line.camera_files import WatchCamera
from saae_runtime.line.cli.check import check_line
from saae_runtime.line.cli.command import app
from saae_runtime.line.config import load_config
from saae_runtime.line.feeds import TriggeredFeed
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.meter import Meter
from saae_runtime.render import encode_png, save_png
from saae_runtime.sources import files, watch
from saae_runtime.sources.scored import Scored


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to watch, whose images are complete soon."""
    monkeypatch.setattr(watch, "SETTLE", 0.05)
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    monkeypatch.setattr(camera_files, "_POLL", 0.01)
    monkeypatch.setattr(camera_files, "_SEEK", 0.01)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "one.seen"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were read so far."""
    names: list[str] = []
    real = files.read_pages

    def read(path: Path, white_level: int | None = None) -> Iterator[object]:
        names.append(path.name)
        return real(path, white_level)

    monkeypatch.setattr(files, "read_pages", read)
    return names


def arrive(folder: Path, name: str, data: bytes) -> None:
    """A file that comes at once."""
    (folder / f".{name}").write_bytes(data)
    (folder / f".{name}").rename(folder / name)


def name_of(shot: Shot) -> str:
    return Path(shot.name).name


def test_a_backlog_is_read_one_image_at_a_time(folder: Path, reads: list[str]) -> None:
    for number in range(6):
        save_png(folder / f"{number}.png", good())
    camera = WatchCamera(str(folder))
    for number in range(3):
        assert name_of(camera.grab(10)) == f"{number}.png"
        assert reads == [f"{each}.png" for each in range(number + 1)]
    save_png(folder / "3.png", bad())  # written again before its turn: read when it has settled again
    assert [name_of(camera.grab(10)) for _ in range(2)] == ["4.png", "5.png"]
    shot = camera.grab(10)
    assert name_of(shot) == "3.png"
    assert (shot.frame == bad()).all()
    assert len(reads) == 6
    camera.close()


def test_an_unreadable_image_is_remembered_when_it_has_its_record(folder: Path, memory: Path) -> None:
    arrive(folder, "part-7.png", b"not an image")
    for _ in range(2):  # nothing is remembered before
        camera = WatchCamera(str(folder), memory)
        with pytest.raises(BadFrameError) as caught:
            camera.grab(10)
        assert Path(caught.value.name).name == "part-7.png"
        camera.close()
    camera = WatchCamera(str(folder), memory)
    with pytest.raises(BadFrameError) as caught:
        camera.grab(10)
    assert caught.value.done is not None
    caught.value.done()
    camera.close()
    arrive(folder, "part-8.png", encode_png(good()))
    camera = WatchCamera(str(folder), memory)
    assert name_of(camera.grab(10)) == "part-8.png"
    camera.close()


def test_a_folder_below_that_may_not_be_listed_does_not_make_the_camera_unavailable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lost+found").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    camera = WatchCamera(str(folder), recursive=True)
    camera.trigger()
    arrive(folder, "a.png", encode_png(good()))
    assert name_of(camera.grab(10)) == "a.png"
    assert camera.stats.connected
    assert "lost+found may not be listed" in camera.stats.last_error
    camera.close()


@pytest.mark.parametrize("trigger", ["free", "http"])
def test_a_check_judges_an_image_that_is_there(tiny: Path, folder: Path, tmp_path: Path, trigger: str) -> None:
    arrive(folder, "part-7.png", encode_png(bad()))
    text = line_text(tiny, camera="watch:in", station=f'trigger = "{trigger}"')
    (tmp_path / "line.toml").write_text(text)
    (found,) = [item for item in check_line(load_config(tmp_path / "line.toml", KINDS)) if item.what == "station one"]
    assert found.good
    assert found.words == "96 x 64 pixels; first: score 127, NG"


def test_a_check_remembers_nothing(tiny: Path, folder: Path, tmp_path: Path) -> None:
    arrive(folder, "part-7.png", b"not an image")
    sink = '[[sink]]\nkind = "jsonl"\npath = "out.jsonl"\n'
    (tmp_path / "line.toml").write_text(line_text(tiny, camera="watch:in", more=sink))
    config = load_config(tmp_path / "line.toml", KINDS)
    for _ in range(2):
        assert any("its first frame is bad" in finding.words for finding in check_line(config))
    with Line(config) as line:
        line.start()
        assert wait_until(lambda: line.stations["one"].reading().counts["NG"])
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["part_id"], record["verdict"]) == ("part-7", "NG")
    with Line(config) as line:
        line.start()
        assert not wait_until(lambda: line.stations["one"].reading().counts["NG"], 1)


def test_a_check_leaves_the_memory_of_a_running_line_alone(tiny: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text(line_text(tiny, camera="watch:in", more=SINKS))
    config = load_config(tmp_path / "line.toml", KINDS)
    memory = config.place(config.line.spool) / "one.seen"
    for finding in check_line(config):  # nothing is there yet
        assert finding.good, finding
    file = side_file(memory, "scored")
    assert not file.exists()
    with Line(config) as line:
        scored = Scored(memory)
        for number in range(1200):  # a file that was written again and again: a start would make the list shorter
            scored.add("/in/latest.png", (100, number))
        scored.close()
        before = (file.stat().st_ino, file.read_bytes())
        list(check_line(config))
        assert CliRunner().invoke(app, ["check", str(config.path)]).exit_code == 2  # the files of the sinks are in use
        assert (file.stat().st_ino, file.read_bytes()) == before
        line.start()
        arrive(folder, "part-7.png", encode_png(good()))
        assert wait_until(lambda: line.stations["one"].reading().counts["OK"])
    assert "part-7.png" in file.read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_check_tells_of_a_memory_that_cannot_be_written(folder: Path, memory: Path) -> None:
    Scored(memory).close()
    side_file(memory, "scored").chmod(0o400)
    with pytest.raises(StorageError, match="Could not write"):
        WatchCamera(str(folder), memory, looking=True)


def test_a_memory_on_a_full_disk_loses_no_record(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Scored, path: str, facts: object) -> None:
        raise storage_error(tmp_path, OSError(28, "No space left on device"))

    monkeypatch.setattr(Scored, "add", full)
    arrive(folder, "part-7.png", encode_png(good()))
    (tmp_path / "line.toml").write_text(line_text(tiny, camera="watch:in", more=SINKS))
    config = load_config(tmp_path / "line.toml", KINDS)
    with Line(config) as line:
        line.start()
        assert wait_until(lambda: line.stations["one"].reading().last_error)
    reading = line.stations["one"].reading()
    assert "disk is full" in (reading.last_error or "")
    assert (reading.counts["OK"], reading.counts.get("unrecorded", 0)) == (1, 0)
    assert json.loads((tmp_path / "out.jsonl").read_text())["part_id"] == "part-7"


@pytest.fixture
def odd_place(folder: Path, tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8, with the watched folder `in`, which has such a file."""
    place = tmp_path / os.fsdecode(b"W\xe4rme")
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    folder.rename(place / "in")
    arrive(place / "in", os.fsdecode(b"T\xfcr.png"), b"not an image")
    return place


def test_the_health_of_a_line_is_text_whatever_the_names_of_files(tiny: Path, odd_place: Path) -> None:
    more = f'{SINKS}\n[archive]\nfolder = "archive"\n'
    (odd_place / "line.toml").write_text(line_text(tiny, camera="watch:in", more=more))
    with Line(load_config(odd_place / "line.toml", KINDS)) as line:
        line.start()
        assert wait_until(lambda: line.stations["one"].reading().counts["NG"])
        line.spool.last_error = StorageError(f"{odd_place} is full.")
        health = line.health()
    json.dumps(health, ensure_ascii=False).encode("utf-8")
    (station,) = health["stations"]
    assert r"T\udcfcr.png" in station["camera"]["last_error"]
    assert r"T\udcfcr.png" in station["last_error"]
    assert health["archive"]["folder"].endswith(r"W\udce4rme/archive")


def test_what_a_watched_folder_says_is_text_whatever_the_names_of_files(odd_place: Path) -> None:
    camera = WatchCamera(str(odd_place / "in"))
    camera.trigger()
    assert r"T\udcfcr.png belongs to no part" in camera.stats.last_error
    (odd_place / "in").rename(odd_place / "away")
    with pytest.raises(DeviceError):
        camera.trigger()
    assert r"W\udce4rme/in is away" in camera.stats.last_error
    camera.close()


def test_what_came_before_the_trigger_is_for_no_part(folder: Path, memory: Path, reads: list[str]) -> None:
    for number in range(20):
        arrive(folder, f"old-{number:02d}.png", encode_png(good()))
    camera = WatchCamera(str(folder), memory)
    for part in range(3):
        camera.trigger()
        arrive(folder, f"part-{part}.png", encode_png(good()))
        shot = camera.grab(10)
        assert name_of(shot) == f"part-{part}.png"
        assert shot.dropped == (20 if part == 0 else 0)
    camera.trigger()
    with pytest.raises(NoFrameError):
        camera.grab(0.1)
    arrive(folder, "late.png", encode_png(bad()))  # of the part that has given up
    time.sleep(0.1)
    camera.trigger()
    arrive(folder, "next.png", encode_png(good()))
    shot = camera.grab(10)
    assert (name_of(shot), shot.dropped, camera.stats.dropped) == ("next.png", 1, 21)
    assert "late.png belongs to no part" in camera.stats.last_error
    assert reads == ["part-0.png", "part-1.png", "part-2.png", "next.png"]
    camera.close()


def test_an_image_that_is_being_written_at_the_trigger_is_for_no_part(folder: Path) -> None:
    data = encode_png(good())
    camera = WatchCamera(str(folder))
    (folder / "late.png").write_bytes(data[:20])
    camera.trigger()
    (folder / "late.png").write_bytes(data)
    with pytest.raises(NoFrameError):
        camera.grab(0.4)
    arrive(folder, "own.png", data)
    assert name_of(camera.grab(10)) == "own.png"
    assert camera.stats.dropped == 1
    camera.close()


def test_a_name_that_is_written_again_and_again_serves_each_part(folder: Path) -> None:
    camera = WatchCamera(str(folder))
    for level in range(4):
        camera.trigger()
        save_png(folder / "latest.png", good() + level)
        assert camera.grab(10).frame[0, 0, 0] == 128 + level
    save_png(folder / "latest.png", bad())  # without a trigger
    camera.trigger()
    with pytest.raises(NoFrameError):
        camera.grab(0.3)
    camera.trigger()
    save_png(folder / "latest.png", good())
    assert camera.grab(10).frame.max() == 128
    assert camera.stats.dropped == 1
    camera.close()


def test_an_old_name_that_changed_when_nobody_looked_is_for_no_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_AROUND", 0.0)
    monkeypatch.setattr(watch, "_AT_LEAST", 5)
    for number in range(200):
        arrive(folder, f"{number:03d}.png", encode_png(good()))
    camera = WatchCamera(str(folder))
    for _ in range(200):
        camera.grab(10)
    (folder / "050.png").write_bytes(encode_png(bad()))
    camera.trigger()  # looks at a few of the old ones only

    def left_out() -> int:
        with pytest.raises(NoFrameError):
            camera.grab(0.1)
        return camera.stats.dropped

    assert wait_until(left_out)
    assert left_out() == 1
    camera.close()


def test_images_without_a_request_are_counted_at_the_station(folder: Path) -> None:
    arrive(folder, "old.png", encode_png(good()))
    source, meter = ListTrigger(), Meter()
    feed = TriggeredFeed(source, WatchCamera(str(folder)), lambda trigger: "no recipe", 0.2, meter)
    source.ask("P1")
    job = feed.next(1)
    assert job is not None
    assert (job.shot, job.problem) == (None, "no recipe")
    threading.Timer(0.1, arrive, (folder, "own.png", encode_png(good()))).start()
    feed._timeout = 10
    source.ask("P2")
    job = feed.next(1)
    assert job is not None
    assert job.shot is not None
    assert name_of(job.shot) == "own.png"
    assert meter.read().counts["dropped"] == 1
    feed._camera.close()


def test_the_other_pages_of_a_file_are_for_no_part(folder: Path) -> None:
    camera = WatchCamera(str(folder))
    camera.trigger()
    pages = [Image.fromarray(frame) for frame in (good(), bad(), bad())]
    pages[0].save(folder / ".a.tif", save_all=True, append_images=pages[1:], format="TIFF")
    (folder / ".a.tif").rename(folder / "a.tif")
    assert name_of(camera.grab(10)) == "a.tif#1"
    camera.trigger()
    assert camera.stats.dropped == 1
    with pytest.raises(NoFrameError):
        camera.grab(0.2)
    camera.close()


def test_a_folder_that_is_away_at_the_trigger_is_found_again_without_one(folder: Path) -> None:
    camera = WatchCamera(str(folder))
    camera.trigger()
    folder.rename(folder.with_name("away"))
    with pytest.raises(DeviceError, match="is away"):
        camera.trigger()
    assert not camera.stats.connected
    arrive(folder.with_name("away"), "meanwhile.png", encode_png(bad()))
    folder.with_name("away").rename(folder)
    assert wait_until(lambda: camera.stats.connected)
    camera.trigger()
    arrive(folder, "own.png", encode_png(good()))
    assert name_of(camera.grab(10)) == "own.png"
    assert (camera.stats.dropped, camera.stats.reconnects) == (1, 1)
    camera.close()
