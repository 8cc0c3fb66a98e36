"""A folder that grows: every picture once, none half-written, and an end that says what was seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from endings import rest_of
from needs import need
from PIL import Image
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.errors import ConfigError, DataError, ImageError
from saae_runtime.images import read_image
from saae_runtime.render import encode_png, save_png
from saae_runtime.sources import watch
from saae_runtime.sources.files import Facts, Frame, Source, image_frames
from saae_runtime.sources.listing import Listing
from saae_runtime.sources.notices import Notices
from saae_runtime.sources.watch import PATIENCE, SETTLE, FolderWatch

SPOT = (10, 20, 9, 14)
LONG = SETTLE * 1.01


def names(found: list[Frame]) -> list[str]:
    return [Path(frame.source.name).name for frame in found]


def look(watcher: FolderWatch, now: float) -> list[Frame]:
    return list(watcher.poll(now))


def test_each_picture_is_given_once_when_it_has_settled(tmp_path: Path) -> None:
    save_png(tmp_path / "b.png", gray_frame(spot=SPOT))
    save_png(tmp_path / "a.png", gray_frame())
    (tmp_path / "notes.txt").write_text("x")
    watcher = FolderWatch([str(tmp_path)])
    assert look(watcher, 0.0) == []
    assert look(watcher, 0.5 * SETTLE) == []
    found = look(watcher, LONG)
    assert names(found) == ["a.png", "b.png"]
    for frame in found:
        assert frame.image is not None
        np.testing.assert_array_equal(frame.image, read_image(frame.source.name))
    save_png(tmp_path / "0.png", gray_frame())
    assert look(watcher, 2 * LONG) == []
    assert names(look(watcher, 3 * LONG)) == ["0.png"]
    assert look(watcher, 100.0) == []


def test_a_file_that_is_still_being_written_is_left_alone(tmp_path: Path) -> None:
    whole = encode_png(gray_frame(spot=SPOT))
    watcher = FolderWatch([str(tmp_path)])
    now = 0.0
    for size in range(0, len(whole), len(whole) // 7):  # slower than SETTLE altogether, never still that long
        (tmp_path / "a.png").write_bytes(whole[:size])
        assert look(watcher, now) == []
        now += 0.9 * SETTLE
        assert look(watcher, now) == []
    (tmp_path / "a.png").write_bytes(whole)
    assert look(watcher, now) == []
    (frame,) = look(watcher, now + LONG)
    assert frame.error is None
    assert frame.image is not None


def test_a_change_that_keeps_the_size_counts_as_writing(tmp_path: Path) -> None:
    path = save_png_at(tmp_path / "a.png", 100)
    watcher = FolderWatch([str(tmp_path)])
    look(watcher, 0.0)
    os.utime(path, ns=(200, 200))
    assert look(watcher, LONG) == []
    assert names(look(watcher, 2 * LONG)) == ["a.png"]


def save_png_at(path: Path, when: int) -> Path:
    save_png(path, gray_frame())
    os.utime(path, ns=(when, when))
    return path


def test_a_pause_of_the_writer_is_no_error(tmp_path: Path) -> None:
    whole = encode_png(gray_frame())
    (tmp_path / "a.png").write_bytes(whole[:-30])
    watcher = FolderWatch([str(tmp_path)])
    for now in (0.0, LONG, 2 * LONG, 0.9 * PATIENCE):
        assert look(watcher, now) == []
    (tmp_path / "a.png").write_bytes(whole)
    assert look(watcher, PATIENCE) == []
    (frame,) = look(watcher, PATIENCE + LONG)
    assert frame.image is not None


def test_what_stays_unreadable_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    watcher = FolderWatch([str(tmp_path)])
    assert look(watcher, 0.0) == look(watcher, LONG) == []
    (frame,) = look(watcher, PATIENCE + 0.1)
    assert isinstance(frame.error, ImageError)
    assert look(watcher, 2 * PATIENCE) == look(watcher, 4 * PATIENCE) == []


def test_a_broken_file_is_read_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    reads: list[Path] = []

    def read(source: Source, facts: Facts, white_level: int | None) -> Iterator[Frame]:
        reads.append(source.path)
        return image_frames(source, facts, white_level)

    monkeypatch.setattr(watch, "image_frames", read)
    watcher = FolderWatch([str(tmp_path)])
    for tenth in range(100):
        look(watcher, tenth / 10)
    assert len(reads) == 2


def test_a_file_that_goes_before_it_was_scored_is_reported(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", gray_frame())
    watcher = FolderWatch([str(tmp_path)])
    look(watcher, 0.0)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    (frame,) = look(watcher, 0.1)
    assert isinstance(frame.error, DataError)
    assert "a.png: removed" in frame.error.what
    assert names(look(watcher, LONG + 0.1)) == ["b.png"]


def test_a_name_that_was_removed_may_come_again(tmp_path: Path) -> None:
    watcher = FolderWatch([str(tmp_path)])
    now = 0.0
    for _ in range(3):
        save_png(tmp_path / "last.png", gray_frame())
        look(watcher, now)
        (frame,) = look(watcher, now + LONG)
        assert str(frame.stem) == "last"
        (tmp_path / "last.png").unlink()
        assert look(watcher, now + 2 * LONG) == []
        now += 3 * LONG


def test_names_of_several_folders_are_kept_apart(tmp_path: Path) -> None:
    for name in ("left/a.png", "right/a.png", "right/deeper/a.png", "right/.hidden/a.png", "right/.a.png"):
        save_png(tmp_path / name, gray_frame())
    save_png(tmp_path / "left" / "a.bmp.png", gray_frame())
    shutil.copyfile(tmp_path / "left" / "a.png", tmp_path / "left" / "A.PNG.jpg")
    watcher = FolderWatch([str(tmp_path / "left"), str(tmp_path / "right")], recursive=True)
    look(watcher, 0.0)
    stems = [str(frame.stem) for frame in look(watcher, LONG)]
    assert len({stem.lower() for stem in stems}) == len(stems) == 5
    assert {"left/a", "right/a", "right/deeper/a"} <= set(stems)


@pytest.mark.parametrize("how", ["rename", "empty"])  # an unmounted share is an empty folder
def test_a_share_that_is_away_is_waited_for_said_and_counted(tmp_path: Path, how: str) -> None:
    folder, said = tmp_path / "share", []
    save_png(folder / "a.png", gray_frame())
    watcher = FolderWatch([str(folder)], say=said.append)
    look(watcher, 0.0)
    assert names(look(watcher, LONG)) == ["a.png"]
    folder.rename(tmp_path / "away")
    if how == "empty":
        folder.mkdir()
    assert look(watcher, 1.0) == look(watcher, 0.9 * PATIENCE) == []
    assert said == []
    for second in range(5, 65):
        assert look(watcher, second) == []
    if how == "empty":
        folder.rmdir()
    else:
        assert len(said) == 1
        assert f"{folder} is away" in said[0]
    (tmp_path / "away").rename(folder)
    save_png(folder / "b.png", gray_frame())
    found = [name for tenth in range(650, 800) for name in names(look(watcher, tenth / 10))]
    assert found == ["b.png"]  # a.png is not given again
    if how == "rename":
        assert watcher.outages == 1
        assert 60 < watcher.away < 80
        assert "is back after" in said[1]


def test_a_folder_that_is_away_is_tried_ever_more_rarely_and_others_go_on(tmp_path: Path, monkeypatch) -> None:
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    watcher = FolderWatch([str(tmp_path / "near"), str(tmp_path / "far")])
    look(watcher, 0.0)
    (tmp_path / "far").rmdir()
    tries: list[float] = []
    real = Listing.changes

    def counted(self, hints, now):
        if self._path.name == "far":
            tries.append(now)
        return real(self, hints, now)

    monkeypatch.setattr(Listing, "changes", counted)
    for fifth in range(1, 600):
        look(watcher, fifth / 5)
    assert 12 < len(tries) < 25
    assert max(later - sooner for sooner, later in pairwise(tries)) <= 10.2
    save_png(tmp_path / "near" / "a.png", gray_frame())
    look(watcher, 130.0)
    assert names(look(watcher, 131.0)) == ["a.png"]


def test_a_folder_that_fails_loses_no_image_of_another(tmp_path: Path, monkeypatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    watcher = FolderWatch([str(tmp_path)], recursive=True)
    look(watcher, 0.0)
    for name in ("a", "b"):
        save_png(tmp_path / name / "x.png", gray_frame())
    real, listings = os.scandir, []

    def fail(folder):
        listings.append(folder)
        if str(folder) == str(tmp_path) or len(set(listings) - {str(tmp_path)}) == 1:
            return real(folder)
        raise OSError(5, "of the second folder")

    with monkeypatch.context() as patched:
        patched.setattr(watch.os, "scandir", fail)
        assert look(watcher, 1.0) == []
    found = [frame.source.name for second in range(2, 20) for frame in look(watcher, float(second))]
    assert sorted(found) == [str(tmp_path / name / "x.png") for name in ("a", "b")]


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that may not be listed; here, because the user of the tests may be root."""
    paths: set[str] = set()
    real = os.scandir

    def scandir(folder):
        if str(folder) in paths:
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    return paths


def test_a_folder_that_may_not_be_listed_is_said_once_and_the_others_go_on(tmp_path: Path, denied: set[str]) -> None:
    for name in ("a.png", "lost+found/x.png", "deeper/b.png"):
        save_png(tmp_path / name, gray_frame())
    said: list[str] = []
    watcher = FolderWatch([str(tmp_path)], recursive=True, say=said.append)
    denied.add(str(tmp_path / "lost+found"))
    found = [name for second in range(10) for name in names(look(watcher, float(second)))]
    assert found == ["a.png", "b.png"]
    denied.add(str(tmp_path / "deeper"))  # what it held is not gone
    save_png(tmp_path / "deeper" / "c.png", gray_frame())
    assert [frame for second in range(10, 20) for frame in look(watcher, float(second))] == []
    assert said == [
        f"{tmp_path / name} may not be listed (permission denied): its images are left out"
        for name in ("lost+found", "deeper")
    ]
    denied.clear()
    found = [name for second in range(20, 30) for name in names(look(watcher, float(second)))]
    assert found == ["c.png", "x.png"]
    assert (len(said), watcher.outages) == (2, 0)


def test_a_named_folder_that_may_not_be_listed_is_away(tmp_path: Path, denied: set[str]) -> None:
    said: list[str] = []
    watcher = FolderWatch([str(tmp_path)], recursive=True, say=said.append)
    denied.add(str(tmp_path))
    assert [frame for second in range(20) for frame in look(watcher, float(second))] == []
    assert said == [f"{tmp_path} is away (Permission denied); waiting for it, Ctrl-C ends the run"]


@pytest.mark.parametrize("change", ["size", "time", "inode", "content"])
def test_a_picture_written_again_under_its_name_is_a_new_one(tmp_path: Path, change: str) -> None:
    path = save_png_at(tmp_path / "latest.png", 10**18)
    watcher = FolderWatch([str(tmp_path)])
    now = 0.0
    for turn in range(3):
        look(watcher, now)
        (frame,) = look(watcher, now + LONG)
        assert str(frame.stem) == "latest"
        assert look(watcher, now + 2 * LONG) == []
        if change == "size":
            path.write_bytes(path.read_bytes() + b"x")
            os.utime(path, ns=(10**18, 10**18))
        elif change == "time":
            os.utime(path, ns=(10**18 + turn + 1, 10**18 + turn + 1))
        elif change == "inode":
            path.rename(tmp_path / f"{turn}.old")
            save_png_at(path, 10**18)
        else:
            path.write_bytes(encode_png(gray_frame(spot=(3, 3, 5 + turn, 5))))
        now += 10.0


def test_a_copy_that_stalls_and_goes_on_is_given_again_when_it_is_whole(tmp_path: Path) -> None:
    whole = encode_png(gray_frame(spot=SPOT))
    (tmp_path / "a.png").write_bytes(whole[:-40])
    watcher = FolderWatch([str(tmp_path)])
    look(watcher, 0.0)
    look(watcher, LONG)
    (frame,) = look(watcher, PATIENCE + 0.1)
    assert frame.error is not None
    (tmp_path / "a.png").write_bytes(whole)
    look(watcher, 10.0)
    (frame,) = look(watcher, 10.0 + LONG)
    assert frame.image is not None


def test_every_known_file_has_its_turn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(watch, "_AROUND", 0.0)
    save_png(tmp_path / "0.png", gray_frame())
    for index in range(1, 700):
        os.link(tmp_path / "0.png", tmp_path / f"{index}.png")
    watcher = FolderWatch([str(tmp_path)])
    look(watcher, 0.0)
    assert len(look(watcher, LONG)) == 700
    (tmp_path / "3.png").unlink()
    save_png(tmp_path / "3.png", gray_frame(spot=SPOT))
    watcher._notices = None
    found = [name for fifth in range(5, 105) for name in names(look(watcher, fifth / 5))]
    assert found == ["3.png"]


@pytest.mark.parametrize("behind", [0, 6, 3600, -6])
def test_a_second_file_within_the_grain_of_a_wrong_clock_is_seen(tmp_path: Path, behind: int) -> None:
    watcher = FolderWatch([str(tmp_path)])
    second = int(time.time() - behind)  # a server that counts whole seconds

    def add(name: str) -> None:
        save_png(tmp_path / name, gray_frame())
        os.utime(tmp_path, (second, second))

    add("a.png")
    assert look(watcher, 0.0) == []
    add("b.png")
    found = [name for fifth in range(1, 30) for name in names(look(watcher, fifth / 5))]
    assert found == ["a.png", "b.png"]


def test_a_folder_that_stays_as_it_is_is_not_listed_again(tmp_path: Path, monkeypatch) -> None:
    watcher = FolderWatch([str(tmp_path)])
    listings: list[str] = []
    real = os.scandir
    monkeypatch.setattr(watch.os, "scandir", lambda folder: (listings.append(folder), real(folder))[1])
    for ahead in (-3600, 3600):  # whatever the clock of its server
        listings.clear()
        when = int(time.time() + ahead)
        os.utime(tmp_path, (when, when))
        for fifth in range(300):
            look(watcher, 5000 + ahead + fifth / 5)
        assert 1 < len(listings) < 5


def test_a_look_at_many_known_files_lists_and_stats_few(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "f").mkdir()
    save_png(tmp_path / "x.png", gray_frame())
    for index in range(2000):
        os.link(tmp_path / "x.png", tmp_path / "f" / f"{index}.png")
    os.utime(tmp_path / "f", ns=(10**18, 10**18))
    watcher = FolderWatch([str(tmp_path / "f")], knows=lambda path, facts: True)
    assert look(watcher, 0.0) == look(watcher, 3.0) == []
    assert watcher.passed_over == 2000
    monkeypatch.setattr(watch, "_AROUND", 0.0)
    calls: list[str] = []
    for name in ("stat", "scandir"):
        real = getattr(os, name)

        def counted(path, *arguments, _real=real, _name=name, **options):
            calls.append(_name)
            return _real(path, *arguments, **options)

        monkeypatch.setattr(watch.os, name, counted)
    look(watcher, 10.0)
    assert "scandir" not in calls
    assert len(calls) < 150


def test_several_pages_are_several_frames(tmp_path: Path) -> None:
    first, second = (Image.fromarray(gray_frame(spot=spot)) for spot in (None, SPOT))
    first.save(tmp_path / "part.tif", save_all=True, append_images=[second])
    watcher = FolderWatch([str(tmp_path)])
    look(watcher, 0.0)
    found = look(watcher, LONG)
    assert [frame.name for frame in found] == [f"{tmp_path}/part.tif#1", f"{tmp_path}/part.tif#2"]
    assert [str(frame.stem) for frame in found] == ["part#1", "part#2"]
    assert found[0].facts is None  # not done before the last page
    assert found[1].facts is not None


def test_links_back_and_pipes_in_a_watched_folder(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "deep" / "a.png", gray_frame())
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "round").symlink_to("round")
    os.mkfifo(tmp_path / "in" / "x.png")
    watcher = FolderWatch([str(tmp_path / "in")], recursive=True)
    look(watcher, 0.0)
    assert names(look(watcher, LONG)) == ["a.png"]
    (frame,) = look(watcher, PATIENCE + 1)
    assert frame.error is not None
    assert "not a regular file" in frame.error.what


def test_notices_of_the_system_bring_what_is_written(tmp_path: Path) -> None:
    need("watchdog")
    notices = Notices([tmp_path], recursive=False)
    try:
        seen: set[str] = set()
        save_png(tmp_path / "a.png", gray_frame())
        (tmp_path / "a.png").rename(tmp_path / "b.png")
        (tmp_path / "notes.txt").write_text("x")
        for _ in range(100):
            seen |= notices.take()
            if {str(tmp_path / "a.png"), str(tmp_path / "b.png")} <= seen:
                break
            time.sleep(0.05)
        assert seen == {str(tmp_path / "a.png"), str(tmp_path / "b.png")}
        time.sleep(0.2)
        notices.take()
        (tmp_path / "b.png").read_bytes()
        time.sleep(0.2)
        assert notices.take() == set()
    finally:
        notices.close()


def test_what_the_system_says_is_found_without_a_listing(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "f"
    save_png(folder / "a.png", gray_frame())
    watcher = FolderWatch([str(folder)])

    class Said:
        def __init__(self) -> None:
            self.paths: set[str] = set()

        def take(self) -> set[str]:
            return self.paths

    watcher._notices = said = Said()
    look(watcher, 0.0)
    look(watcher, 3.0)
    save_png(folder / "b.png", gray_frame())
    said.paths = {str(folder / "b.png")}
    monkeypatch.setattr(watch.os, "scandir", None)
    look(watcher, 3.1)
    assert names(look(watcher, 3.1 + LONG)) == ["b.png"]


def test_only_folders_are_watched(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", gray_frame())
    for name in (str(tmp_path / "a.png"), str(tmp_path / "nothing"), "camera:0", f"{tmp_path}/*.png"):
        with pytest.raises(ConfigError, match="not a folder") as caught:
            FolderWatch([name])
        assert caught.value.cure


# --- the command ---


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_goes_on_until_it_is_stopped(tmp_path: Path, number: int) -> None:
    bundle, folder = make_tiny_bundle(tmp_path / "bundle"), tmp_path / "arriving"
    save_png(folder / "0.png", gray_frame())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "saae_runtime.cli", str(bundle), str(folder), "--watch", "--json", "-"]
    command += ["--out", str(tmp_path / "out"), "--masks", "--backend", "onnxruntime:cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        records = [json.loads(process.stdout.readline())]
        whole = encode_png(gray_frame(spot=SPOT))
        (folder / "1.png").write_bytes(whole[:100])
        time.sleep(0.3)
        (folder / "1.png").write_bytes(whole)
        records.append(json.loads(process.stdout.readline()))
        process.send_signal(number)
        rest, log = rest_of(process, 60)
    assert rest == ""
    assert process.returncode == 128 + number
    assert [(Path(item["source"]).name, item["is_anomalous"]) for item in records] == [
        ("0.png", False),
        ("1.png", True),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.mask.png", "1.mask.png"]
    assert "2 frames: 1 clean, 1 defective, 0 unreadable" in log
    assert "Traceback" not in log


@pytest.mark.needs("onnxruntime")
def test_a_limit_ends_the_watch(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from saae_runtime.cli import command as cli

    for index in range(3):
        save_png(tmp_path / "f" / f"{index}.png", gray_frame())
    bundle = make_tiny_bundle(tmp_path / "bundle")
    done = CliRunner().invoke(cli.app, [str(bundle), str(tmp_path / "f"), "--watch", "--limit", "2"])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 2
    done = CliRunner().invoke(cli.app, [str(bundle), str(tmp_path / "f"), "--watch", "--out", str(tmp_path / "f")])
    assert done.exit_code == 2  # it would score its own pictures
