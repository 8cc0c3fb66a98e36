"""The archive: what is kept, what goes first, and what happens when the disk is full."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from line_parts import wait_until

from saae_runtime.images import read_image
from saae_runtime.line.archive import Archive
from saae_runtime.line.config import ArchiveConfig
from saae_runtime.line.part import Part, Verdict
from saae_runtime.result import Result

NOON = datetime(2026, 3, 4, 12, tzinfo=timezone.utc)


def part(number: int, ng: bool = True, part_id: str | None = None, recipe: str | None = None) -> Part:
    verdict = Verdict.NG if ng else Verdict.OK
    return Part(part_id or f"p{number}", "one", NOON + timedelta(seconds=number), verdict, "score", recipe)


def noise(seed: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def archive(folder: Path, **options: object) -> Archive:
    values = {"folder": str(folder), "min_free_gb": 0.0, "ok_share": 1.0, **options}
    return Archive(ArchiveConfig(**values), folder)  # type: ignore[arg-type]


def keep(made: Archive, item: Part, frame: np.ndarray, result: Result | None = None) -> str | None:
    name = made.plan(item)
    if name is not None:
        made.put(name, frame, result)
    return name


def done(made: Archive) -> None:
    made.finish(time.monotonic() + 30)


def names(folder: Path, verdict: str) -> list[str]:
    return sorted(path.name for path in (folder / verdict).rglob("*.*")) if (folder / verdict).exists() else []


def age(path: Path, days: float) -> None:
    moment = time.time() - days * 86400
    os.utime(path, (moment, moment))


def test_pictures_lie_by_verdict_recipe_and_day_under_their_recorded_names(tmp_path: Path) -> None:
    made = archive(tmp_path)
    name = keep(made, part(1, part_id="../ä/7 8"), noise(1))
    other = keep(made, part(2, ng=False, recipe="first"), noise(2))
    done(made)
    assert name == "NG/_/2026-03-04/120001.000000_one_.._7_8.png"  # it was not judged
    assert other == "OK/first/2026-03-04/120002.000000_one_p2.png"
    np.testing.assert_array_equal(read_image(tmp_path / name), noise(1))
    np.testing.assert_array_equal(read_image(tmp_path / other), noise(2))
    assert made.state()["written"] == 2


def test_jpg_and_overlays(tmp_path: Path) -> None:
    made = archive(tmp_path, format="jpg", overlays=True)
    mask = np.zeros((40, 40), np.bool_)
    mask[5:9, 5:9] = True
    heat = mask.astype(np.float32) * 9
    name = keep(made, part(1), noise(1), Result(9.0, heat, mask, 1.0, 1.0))
    keep(made, part(2, ng=False), noise(2), Result(0.0, heat * 0, mask & False, 1.0, 1.0))
    done(made)
    assert len(names(tmp_path, "NG")) == 2
    assert len(names(tmp_path, "OK")) == 1
    assert name is not None
    assert read_image(tmp_path / name.replace(".jpg", ".overlay.jpg")).shape == (40, 40, 3)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_ok_parts_keeps_its_picture(tmp_path: Path, share: float) -> None:
    made = archive(tmp_path, ok_share=share)
    kept = [made.plan(part(number, ng=False)) is not None for number in range(5000)]
    assert sum(kept) == pytest.approx(5000 * share, abs=100)
    assert all(made.plan(part(number)) for number in range(50))
    again = archive(tmp_path, ok_share=share)  # the same parts after a restart
    assert [again.plan(part(number, ng=False)) is not None for number in range(200)] == kept[:200]
    done(made)
    done(again)


def test_old_pictures_go_ng_later_than_ok(tmp_path: Path) -> None:
    made = archive(tmp_path, ok_days=2, ng_days=10)
    for number in range(4):
        keep(made, part(number, ng=number < 2), noise(number))
    done(made)
    for path, days in zip(sorted(tmp_path.rglob("*.png")), (5, 11, 0, 3), strict=True):  # NG p0, p1, OK p2, p3
        age(path, days)
    made = archive(tmp_path, ok_days=2, ng_days=10)
    made.sweep()
    assert names(tmp_path, "NG") == ["120000.000000_one_p0.png"]
    assert names(tmp_path, "OK") == ["120002.000000_one_p2.png"]
    done(made)


def test_pictures_from_before_recipes_had_folders_go_with_their_age(tmp_path: Path) -> None:
    made = archive(tmp_path, ok_days=2)
    for number in range(2):
        keep(made, part(number, ng=False, recipe="first"), noise(number))
    done(made)
    old, new = sorted(tmp_path.rglob("*.png"))
    earlier = tmp_path / "OK" / "2026-03-03" / old.name
    earlier.parent.mkdir()
    old.rename(earlier)
    made = archive(tmp_path, ok_days=2)
    made.sweep()
    assert made.state()["bytes"] == earlier.stat().st_size + new.stat().st_size
    age(earlier, 3)
    made.sweep()
    done(made)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [new]
    assert not earlier.parent.exists()


def test_pictures_made_while_the_clock_is_behind_are_not_old_when_it_is_right_again(tmp_path: Path) -> None:
    right = time.time() + 1000 * 86400  # so the disk, too, gives new files a time that is behind
    memory = tmp_path / "archive.age"
    memory.touch()
    os.utime(memory, (right, right))  # an earlier run
    for number, moment in enumerate((0.0, right)):  # an empty battery; then the network sets the clock
        made = Archive(ArchiveConfig("a", min_free_gb=0.0), tmp_path / "a", lambda moment=moment: moment, memory)
        keep(made, part(number), noise(number))
        done(made)
        made.sweep()
        assert len(names(tmp_path / "a", "NG")) == number + 1


def test_the_oldest_ok_go_first_when_it_is_too_much(tmp_path: Path) -> None:
    made = archive(tmp_path)
    for number in range(10):
        keep(made, part(number, ng=number % 2 == 0), noise(number))
    done(made)
    pictures = sorted(tmp_path.rglob("*.png"), key=lambda path: path.name)
    for days, path in enumerate(reversed(pictures)):
        age(path, days * 0.1)
    size = pictures[0].stat().st_size
    made = archive(tmp_path, max_gb=7.5 * size / 1e9)
    made.sweep()
    assert names(tmp_path, "OK") == [f"12000{n}.000000_one_p{n}.png" for n in (7, 9)]
    assert len(names(tmp_path, "NG")) == 5
    done(made)
    made = archive(tmp_path, max_gb=3.5 * size / 1e9)
    made.sweep()
    assert names(tmp_path, "OK") == []
    assert names(tmp_path, "NG") == [f"12000{n}.000000_one_p{n}.png" for n in (4, 6, 8)]
    assert made.state()["bytes"] <= 3.5 * size
    done(made)


def test_a_wrong_clock_does_not_empty_the_archive(tmp_path: Path) -> None:
    ahead, memory = [0.0], tmp_path / "age"

    def opened() -> Archive:
        config = ArchiveConfig(str(tmp_path), ok_share=1.0, min_free_gb=0.0)
        return Archive(config, tmp_path, lambda: time.time() + ahead[0], memory)

    made = opened()
    for number in range(4):
        keep(made, part(number, ng=number < 2), noise(number))
    assert wait_until(lambda: made.state()["written"] == 4)
    ahead[0] = 100 * 86400.0
    made.sweep()
    keep(made, part(4), noise(4))
    done(made)
    later = max(tmp_path.rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    age(later, -100)  # it has the wrong clock's time
    for _ in range(2):
        made = opened()  # a restart, and the clock is still wrong
        made.sweep()
        done(made)
    ahead[0] = 0.0
    made = opened()
    made.sweep()
    assert (len(names(tmp_path, "NG")), len(names(tmp_path, "OK"))) == (3, 2)
    done(made)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_makes_room_by_the_oldest_ok(small_disk: Path) -> None:
    made = archive(small_disk)
    for number in range(40):  # of 14 kB each
        keep(made, part(number, ng=number % 4 == 0), noise(number, 68))
        wait_until(lambda: made.state()["waiting"] == 0)
    done(made)
    assert made.state()["removed"] > 0
    assert len(names(small_disk, "NG")) == 10
    kept = names(small_disk, "OK")
    assert kept == [f"1200{n:02d}.000000_one_p{n}.png" for n in range(40) if n % 4][-len(kept) :]


def test_a_disk_full_of_other_things_costs_pictures_and_says_so(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x" * 510_000)
    made = archive(small_disk)
    assert keep(made, part(1), noise(1, 68)) is not None
    assert wait_until(lambda: made.state()["left_out"] == 1)
    assert "the disk is full" in made.state()["last_error"]
    assert made.plan(part(2)) is None  # the record names no picture while there is no room
    assert not list(small_disk.rglob("*.png"))
    done(made)
