"""saae-run in a process of its own: stopped, cut off from its reader, on a terminal, on a full disk."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from endings import rest_of
from saae_run import COMMAND, ENVIRONMENT, spawn
from tiny_bundle import gray_frame

from saae_runtime.render import save_png

pytestmark = pytest.mark.needs("onnxruntime")


def many(folder: Path, count: int) -> Path:
    """A folder with one image under many names."""
    save_png(folder / "000000.png", gray_frame())
    for index in range(1, count):
        os.link(folder / "000000.png", folder / f"{index:06d}.png")
    return folder


def test_name_that_is_no_utf8(bundle: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "x.png", gray_frame())
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    try:
        (tmp_path / "x.png").rename(os.fsdecode(raw))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with spawn(bundle, tmp_path, "--json", "-") as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert os.fsencode(json.loads(out)["source"]) == raw
    with spawn(bundle, tmp_path) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.startswith(b"clean")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_ends_cleanly_with_whole_lines_and_the_summary(bundle: Path, tmp_path: Path, number: int) -> None:
    count = 3000  # more lines than a pipe holds: nobody reads on, so the run cannot have ended by itself
    folder = many(tmp_path / "frames", count)
    with spawn(bundle, folder, "--json", "-") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(number)
        rest, log = rest_of(process, 120)
    assert process.returncode == 128 + number, log.decode()
    lines = (first + rest).decode().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    indices = [int(Path(json.loads(line)["source"]).stem) for line in lines]
    assert indices == list(range(len(lines)))
    assert len(lines) < count
    assert f"{len(lines)} frames: {len(lines)} clean" in log.decode()
    assert "Traceback" not in log.decode()


def test_reader_that_goes_ends_the_run_quietly(bundle: Path, tmp_path: Path) -> None:
    folder = many(tmp_path / "frames", 3000)
    for extra in ([], ["--json", "-"]):
        with spawn(bundle, folder, *extra) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            log = process.stderr.read().decode()
            assert process.wait(timeout=120) == 141
        assert "Traceback" not in log
        assert "BrokenPipe" not in log
        assert "clean" in log


def test_progress_on_a_terminal_leaves_the_results_on_standard_output(bundle: Path, frames: Path) -> None:
    parent, child = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [*COMMAND, str(bundle), str(frames), "--json", "-"], stdout=subprocess.PIPE, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # Linux: the other end of the terminal is closed
            break
        if not part:
            break
        shown += part
    out, _ = process.communicate(timeout=120)
    os.close(parent)
    assert process.returncode == 1
    assert len([json.loads(line) for line in out.splitlines()]) == 4
    assert b"4/4" in shown
    assert b"4 frames: 2 clean, 2 defective" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("extra", [[], ["--json", "-"], ["--json", "/dev/full"]])
def test_a_full_disk_under_the_results_is_an_error_with_a_cure(bundle: Path, clean: Path, extra: list[str]) -> None:
    command = [*COMMAND, str(bundle), str(clean), "--backend", "onnxruntime:cpu", *extra]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 4
    assert "disk is full" in done.stderr
    assert "free space" in done.stderr
    assert "2 verdicts could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
