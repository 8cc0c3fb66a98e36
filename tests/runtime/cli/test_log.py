"""The result log over many runs: appended, locked, turned over, mended; and what an earlier run has scored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from saae_run import COMMAND, ENVIRONMENT, SPOT, run
from tiny_bundle import gray_frame

from saae_runtime.appending import Rotation
from saae_runtime.cli.log import JsonLines
from saae_runtime.errors import ConfigError
from saae_runtime.render import save_png
from saae_runtime.sources.scored import Scored


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    for name in ("a", "b", "c"):
        save_png(folder / f"{name}.png", gray_frame(spot=SPOT if name == "b" else None))
    return folder


def sources(log: Path) -> list[str]:
    return [Path(json.loads(line)["source"]).name for line in log.read_text().splitlines()]


def test_a_second_run_appends_and_overwrite_begins_anew(bundle: Path, frames: Path, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    run(bundle, frames, "--json", log)
    run(bundle, frames / "a.png", "--json", log)
    assert sources(log) == ["a.png", "b.png", "c.png", "a.png"]
    run(bundle, frames / "c.png", "--json", log, "--overwrite")
    assert sources(log) == ["c.png"]


def test_what_was_scored_is_passed_over_when_asked(bundle: Path, frames: Path, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    run(bundle, frames, "--json", log)
    save_png(frames / "b.png", gray_frame(spot=(1, 1, 9, 9)))  # written again: another picture
    save_png(frames / "d.png", gray_frame())
    done = run(bundle, frames, "--json", log, "--skip-scored")
    assert sources(log)[3:] == ["b.png", "d.png"]
    assert "2 files skipped" in done.stderr
    done = run(bundle, frames, "--json", log, "--skip-scored")
    assert done.exit_code == 0  # nothing new is no fault
    assert len(sources(log)) == 5
    assert "4 files skipped" in done.stderr
    run(bundle, frames, "--json", log, "--skip-scored", "--overwrite")
    assert sources(log) == ["a.png", "b.png", "c.png", "d.png"]


def watch(bundle: Path, folder: Path, log: Path, expected: int, *more: str) -> str:
    """Watches until the log has so many lines, and a moment longer; returns what was said."""
    arguments = map(str, (bundle, folder, "--watch", "--json", log, "--backend", "onnxruntime:cpu", *more))
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") >= expected):
            time.sleep(0.05)
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 143, said
    return said


def test_a_watch_that_starts_again_goes_on_where_it_was(bundle: Path, frames: Path, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    watch(bundle, frames, log, 3)
    save_png(frames / "d.png", gray_frame())
    said = watch(bundle, frames, log, 4)
    assert sources(log) == ["a.png", "b.png", "c.png", "d.png"]
    assert "3 files skipped" in said
    watch(bundle, frames, log, 8, "--score-again")
    assert len(sources(log)) == 8


def test_a_page_cut_off_by_a_kill_is_scored_again_whole(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "f").mkdir()
    pages = [Image.fromarray(gray_frame(spot=spot)) for spot in (None, SPOT, None)]
    pages[0].save(tmp_path / "f" / "part.tif", save_all=True, append_images=pages[1:])
    log = tmp_path / "r.jsonl"
    done = run(bundle, tmp_path / "f", "--json", log, "--limit", 2, "--out", tmp_path / "p", "--masks")
    assert done.exit_code == 1
    assert sources(log) == ["part.tif#1", "part.tif#2"]
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"part#1.mask.png", "part#2.mask.png"}
    run(bundle, tmp_path / "f", "--json", log, "--skip-scored")
    assert sources(log)[2:] == ["part.tif#1", "part.tif#2", "part.tif#3"]
    run(bundle, tmp_path / "f", "--json", log, "--skip-scored")
    assert len(sources(log)) == 5


def test_two_runs_on_one_log_do_not_mix(bundle: Path, frames: Path, tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    lines = JsonLines(str(log))
    lines.write({"source": "x"})
    done = run(bundle, frames, "--json", log)
    assert done.exit_code == 2
    assert "already running" in done.stderr
    assert str(log) in done.stderr
    lines.close()
    assert log.read_text() == '{"source": "x"}\n'
    assert run(bundle, frames, "--json", log).exit_code == 1  # and the lock is gone with its holder


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_log_is_turned_over_by_size(tmp_path: Path, keep: int) -> None:
    log = tmp_path / "r.jsonl"
    lines = JsonLines(str(log), rotation=Rotation.parse("40B", keep))
    for index in range(11):
        lines.write({"source": index})  # 14 or 15 bytes: two fit
    lines.close()
    found = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert found == ["r.jsonl", *(f"r.jsonl.{number}" for number in range(1, keep + 1))]
    kept = [*(tmp_path / f"r.jsonl.{number}" for number in range(keep, 0, -1)), log]
    written = [json.loads(line)["source"] for path in kept for line in path.read_text().splitlines()]
    assert written == list(range(11))[-len(written) :]
    assert len(written) == 2 * keep + 1


def test_a_log_is_turned_over_by_day_also_after_a_restart(tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    log.write_text('{"source": "yesterday"}\n')
    os.utime(log, (time.time() - 2 * 86400,) * 2)
    lines = JsonLines(str(log), rotation=Rotation.parse("day", 5))
    lines.write({"source": "today"})
    lines.write({"source": "today"})
    lines.close()
    assert sources(log) == ["today", "today"]
    assert sources(tmp_path / "r.jsonl.1") == ["yesterday"]
    assert not (tmp_path / "r.jsonl.2").exists()


def test_fewer_kept_logs_than_before_remove_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    for keep in (5, 2):
        lines = JsonLines(str(log), rotation=Rotation.parse("20", keep))
        for index in range(8):
            lines.write({"source": index})
        lines.close()
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("r.jsonl.")]) == 2


@pytest.mark.parametrize("text", ["", "0", "often", "-3", "1e9", "MB", "3 days"])
def test_a_rotation_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--rotate"):
        Rotation.parse(text, 3)


def test_sizes_as_people_write_them() -> None:
    sizes = {"100": 100, "5k": 5000, "100MB": 100_000_000, "2 GiB": 2_000_000_000, "1m": 1_000_000}
    assert {text: Rotation.parse(text, 3).size for text in sizes} == sizes


@pytest.mark.parametrize("option", [["--rotate", "day"], ["--overwrite"]])
def test_options_of_a_log_need_a_log(bundle: Path, frames: Path, option: list[str]) -> None:
    for target in ([], ["--json", "-"]):
        done = run(bundle, frames, *option, *target)
        assert done.exit_code == 2
        assert option[0] in done.stderr


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"source": "b", "fra', '{"source": "a"}\n'),
        ("{", '{"source": "a"}\n'),
        ("notes of somebody", '{"source": "a"}\nnotes of somebody\n'),
    ],
)
def test_a_line_that_a_power_cut_left_half_is_ended(tmp_path: Path, tail: str, kept: str) -> None:
    log = tmp_path / "r.jsonl"
    log.write_text('{"source": "a"}\n' + tail)
    lines = JsonLines(str(log))
    lines.write({"source": "c"})
    lines.close()
    assert log.read_text() == kept + '{"source": "c"}\n'


def test_scored_files_are_remembered_by_name_size_and_time(tmp_path: Path) -> None:
    log = tmp_path / "r.jsonl"
    scored = Scored(log)
    scored.add("/x/a\n\udcff.png", (10, 20))
    scored.add("/x/b.png", (1, 2))
    scored.add("/x/b.png", (1, 3))
    scored.close()
    side = next(path for path in tmp_path.iterdir() if path.name.endswith(".scored"))
    side.write_text(side.read_text() + '["/x/half')
    scored = Scored(log)
    assert scored.knows("/x/a\n\udcff.png", (10, 20))
    assert scored.knows("/x/b.png", (1, 3))
    assert not scored.knows("/x/b.png", (1, 2))
    assert not scored.knows("/x/half", (1, 2))
    assert not scored.knows("/x/b.png", None)
    scored.close()
    scored = Scored(log, forget=True)
    assert not scored.knows("/x/b.png", (1, 3))
    scored.close()


def test_the_list_of_scored_files_does_not_grow_without_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("saae_runtime.sources.scored._REMEMBERED", 50)
    for _ in range(3):
        scored = Scored(tmp_path / "r.jsonl")
        for index in range(2000):
            scored.add(f"/x/{index}.png", (index, index))
        assert len(scored._known) == 50
        scored.close()
    scored = Scored(tmp_path / "r.jsonl")
    scored.close()
    (side,) = (path for path in tmp_path.iterdir() if path.name.endswith(".scored"))
    assert len(side.read_text().splitlines()) == 50
    assert scored.knows("/x/1999.png", (1999, 1999))


def test_a_long_name_of_a_log(bundle: Path, frames: Path, tmp_path: Path) -> None:
    log = tmp_path / ("r" * 250)
    assert run(bundle, frames, "--json", log).exit_code == 1
    assert len(log.read_text().splitlines()) == 3


def test_a_link_as_log_is_written_through(bundle: Path, frames: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "r.jsonl").symlink_to("real/r.jsonl")
    run(bundle, frames, "--json", tmp_path / "r.jsonl")
    assert len((tmp_path / "real" / "r.jsonl").read_text().splitlines()) == 3
    shutil.rmtree(tmp_path / "real")
