"""`saae-line`: the example runs as it is, what is missing is said, and a stop or a kill loses nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from endings import rest_of
from line_parts import bad, good, line_text, wait_until
from rtsp_process import rtsp_server
from typer.testing import CliRunner, Result

from saae_runtime.line.cli.command import _Printer, app
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.render import save_png

SINKS = """
[[sink]]
kind = "jsonl"
path = "out.jsonl"
[[sink]]
kind = "sqlite"
path = "out.sqlite"
"""


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def start(file: Path, *words: str, code: str = "", **environment: str) -> subprocess.Popen[str]:
    """The command on a file; or code in its place, with the same words."""
    program = ["-c", code] if code else ["-m", "saae_runtime.line.cli"]
    return subprocess.Popen(
        [sys.executable, *program, "run", file, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def part_ids(file: Path) -> list[str]:
    return [json.loads(line)["part_id"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "\u00fc"), ("ascii", r"\xfc")])
def test_a_name_that_the_output_cannot_hold_is_printed_with_escapes(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", out)
    printer = _Printer()
    for part_id in ("T\udcfcr", "T\u00fcr", "last"):
        printer.say(Part(part_id, "one", now(), Verdict.NG, "timeout"))
    printer._lines.put(None)
    printer._thread.join(20)
    out.flush()
    assert out.buffer.getvalue().decode(encoding).splitlines() == [  # type: ignore[attr-defined]
        r"NG one T\udcfcr timeout",
        f"NG one T{shown}r timeout",
        "NG one last timeout",
    ]


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(6):
        save_png(folder / f"{number}.png", bad() if number == 4 else good())
    return folder


def test_the_example_runs_as_it_is(tiny: Path, frames: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bundle")
    shutil.copytree(frames, tmp_path / "bundle" / "samples")
    file = tmp_path / "line.toml"
    made = invoke("init", file, "--bundle", tmp_path / "bundle")
    assert made.exit_code == 0, made.output
    assert 'camera = "bundle/samples"' in file.read_text()
    checked = invoke("check", file)
    assert checked.exit_code == 0, checked.output
    assert "everything is there" in checked.output
    done = invoke("run", file)
    assert done.exit_code == 0, done.output
    assert done.output.count("OK station-1") == 5
    assert "NG station-1 4 127" in done.output
    assert part_ids(tmp_path / "records.jsonl") == ["0", "1", "2", "3", "4", "5"]
    assert len(list((tmp_path / "pictures" / "NG").rglob("*.png"))) == 1
    again = invoke("init", file, "--bundle", tmp_path / "bundle")
    assert again.exit_code == 2
    assert "--force" in again.output


def test_check_says_what_is_missing(tiny: Path, frames: Path, tmp_path: Path) -> None:
    more = '[[station]]\nname = "two"\ncamera = "gone"\nrecipes = ["bad"]\n'
    more += '[[recipe]]\nname = "bad"\nbundle = "nowhere"\n[[sink]]\nkind = "csv"\npath = "x.csv"\n'
    (tmp_path / "x.csv").write_text("somebody's\n")
    (tmp_path / "line.toml").write_text(line_text(tiny, more=more))
    done = invoke("check", tmp_path / "line.toml")
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert "good recipe first" in text
    assert "bad recipe bad: No bundle at" in text
    assert "good station one: 96 x 64 pixels; first: score 0, OK" in text
    assert "bad station two:" in text
    assert "a different table" in text
    assert "3 cannot be used" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "gone.toml"), "no such file"),
        (("check", "gone.toml"), "saae-line init"),
        (("init", "x.toml"), "--bundle is missing"),
        (("init", "x.toml", "--bundle", "gone"), "No bundle at gone"),
    ],
)
def test_errors_are_words(words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*words)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "x.toml").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_with_everything_written(tiny: Path, frames: Path, tmp_path: Path, number: signal.Signals) -> None:
    station = "camera_options = { repeat = true, interval = 0.005 }"
    (tmp_path / "line.toml").write_text(line_text(tiny, station=station, more=SINKS))
    place = str(tmp_path / "notify")
    said: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(place)
        manager.settimeout(60)

        def listen() -> None:
            while b"STOPPING=1" not in said:
                said.append(manager.recv(200))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        with start(tmp_path / "line.toml", NOTIFY_SOCKET=place, WATCHDOG_USEC="300000") as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(20)]
            assert wait_until(lambda: b"WATCHDOG=1" in said)
            # A stop waits two seconds for a sink: those of this one are open and take records by now.
            assert wait_until(lambda: len(part_ids_so_far(tmp_path / "out.jsonl")) >= 20)
            assert wait_until(lambda: parts_in(tmp_path / "out.sqlite") >= 20)
            process.send_signal(number)
            out, err = rest_of(process, 30)
        listener.join(20)
        assert process.returncode == 0, err
    told = [line.split()[2] for line in [*lines, *out.splitlines()]]
    assert part_ids(tmp_path / "out.jsonl") == told
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        assert database.execute("SELECT count(*) FROM parts").fetchone() == (len(told),)
    assert f"jsonl: {len(told)} records" in err
    assert said[0].startswith(b"READY=1")
    assert said[-1] == b"STOPPING=1"


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.fuzz)])
def test_kills_lose_no_record_and_double_none(tiny: Path, tmp_path: Path, kills: int) -> None:
    """Each picture has its record once, however often the service is killed, and nothing is left lying about."""
    folder = tmp_path / "in"
    folder.mkdir()
    archive = '[archive]\nfolder = "p"\nmin_free_gb = 0.0\nok_share = 1.0\n'
    (tmp_path / "line.toml").write_text(line_text(tiny, camera="watch:in", more=SINKS + archive))
    each = 30
    for turn in range(kills):
        for number in range(turn * each, (turn + 1) * each):
            save_png(folder / f"{number:05d}.png", bad() if number % 7 == 0 else good())
        with start(tmp_path / "line.toml") as process:
            assert process.stdout is not None
            for _ in range(1 + (turn * 13) % each):
                process.stdout.readline()
            process.kill()
    with start(tmp_path / "line.toml", "-q") as process:
        names = [f"{number:05d}" for number in range(kills * each)]
        assert wait_until(lambda: len(part_ids_so_far(tmp_path / "out.jsonl")) >= len(names), 120)
        process.send_signal(signal.SIGTERM)
        _, err = rest_of(process, 30)
    assert process.returncode == 0, err
    found = part_ids(tmp_path / "out.jsonl")
    assert sorted(found) == names
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        rows = database.execute("SELECT part_id, verdict FROM parts ORDER BY part_id").fetchall()
    assert [row[0] for row in rows] == names
    assert {row[1] for row in rows if int(row[0]) % 7 == 0} == {"NG"}
    assert {row[1] for row in rows if int(row[0]) % 7} == {"OK"}
    assert len(list((tmp_path / "spool").iterdir())) <= 6


def stream_text(tiny: Path, port: int) -> str:
    """A line that looks at a stream, and waits a minute for one that says nothing."""
    station = "camera_options = { timeout = 60.0 }"
    return line_text(tiny, camera=f"rtsp://127.0.0.1:{port}/line", station=station, more=SINKS)


@pytest.mark.needs("av")
def test_a_stop_does_not_wait_for_a_server_that_says_nothing_at_the_start(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        (tmp_path / "line.toml").write_text(stream_text(tiny, mute.getsockname()[1]))
        with start(tmp_path / "line.toml") as process:
            mute.accept()  # the line is opening its camera
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Stopped." in err


@pytest.mark.needs("av")
def test_a_stop_does_not_wait_for_a_frozen_camera(tiny: Path, tmp_path: Path, repo_root: Path) -> None:
    with rtsp_server(repo_root) as (server, port):
        (tmp_path / "line.toml").write_text(stream_text(tiny, port))
        with start(tmp_path / "line.toml") as process:
            assert process.stdout is not None
            process.stdout.readline()
            server.send_signal(signal.SIGSTOP)
            time.sleep(1)  # the reading thread is in the library now
            process.send_signal(signal.SIGTERM)
            out, err = rest_of(process, 30)
    assert process.returncode == 0, err
    assert len(part_ids(tmp_path / "out.jsonl")) == 1 + len(out.splitlines())


def test_a_second_stop_ends_the_line_at_once(tiny: Path, frames: Path, tmp_path: Path) -> None:
    """The first one waits for a part that takes long; the same words and code as of every other command."""
    station = "camera_options = { repeat = true }"
    (tmp_path / "line.toml").write_text(line_text(tiny, station=station))
    words = "import time\nfrom saae_runtime.line.service import Line\nLine.close = lambda self: time.sleep(60)\n"
    words += "from saae_runtime.line.cli import main\nmain()\n"
    with start(tmp_path / "line.toml", code=words) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "stopping" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = rest_of(process, 30)
    assert process.returncode == 130
    assert err.endswith("Stopped.\n")


def parts_in(file: Path) -> int:
    """Of a database that is being written."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM parts").fetchone()[0])
    except sqlite3.Error:
        return 0


def part_ids_so_far(file: Path) -> list[str]:
    """Of whole lines: the last one may be half there."""
    return file.read_text().split("\n")[:-1] if file.exists() else []
