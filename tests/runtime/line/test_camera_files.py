"""Files as cameras: one image at a time, each remembered when it has its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from line_parts import bad, good, line_text, wait_until

from saae_runtime.line import camera_files
from saae_runtime.line.camera import BadFrameError, Shot
from saae_runtime.line.camera_files import WatchCamera
from saae_runtime.line.cli.check import check_line
from saae_runtime.line.config import load_config
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.render import encode_png, save_png
from saae_runtime.sources import files, watch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to watch, whose images are complete soon."""
    monkeypatch.setattr(watch, "SETTLE", 0.05)
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    monkeypatch.setattr(camera_files, "_POLL", 0.01)
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
