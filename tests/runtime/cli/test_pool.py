"""Several processes say what one says, in the same order; one that dies costs nothing, a deadly file its own place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from saae_run import ENVIRONMENT, opener, run, told
from tiny_bundle import gray_frame
from typer.testing import CliRunner

from saae_runtime import Engine
from saae_runtime.cli.command import app
from saae_runtime.cli.pool import ProcessPool, score_in_pool
from saae_runtime.cli.scoring import Outcome
from saae_runtime.errors import BackendError, BundleError
from saae_runtime.images import read_image
from saae_runtime.render import save_png
from saae_runtime.sources.files import find_sources

pytestmark = pytest.mark.needs("onnxruntime")


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images, every third defective, of two sizes, and one that is none."""
    folder = tmp_path_factory.mktemp("frames")
    for index in range(30):
        size = (64, 96) if index % 2 else (100, 70)
        spot = (index, 10, 9, 14) if index % 3 == 0 else None
        save_png(folder / f"{index:03d}.png", gray_frame(size, spot))
    (folder / "015.png").write_bytes(b"no image")
    return folder


def score_in_processes(open_engine, sources, processes: int, keep_images: bool = False, stop=None) -> Iterator[Outcome]:
    return score_in_pool(ProcessPool(open_engine, processes, keep_images), sources, stop)


class DeadlyEngine(Engine):
    """Takes its process with it on a frame whose first pixel is 13."""

    def __call__(self, frame, **options):
        if frame[0, 0, 0] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(frame, **options)


def open_deadly(bundle: Path) -> Engine:
    return DeadlyEngine(bundle, backend="onnxruntime:cpu", threads=1)


def test_the_same_verdicts_in_the_same_order(bundle: Path, frames: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        words = [bundle, frames, "--backend", "onnxruntime:cpu", "--processes", processes, "--json", "-"]
        pictures = ["--out", tmp_path / str(processes), "--heatmaps"]
        done = run(*words, *pictures)
        assert done.exit_code == 1, done.output
        found.append(told(done.stdout))
    for line in (*found[0], *found[1]):
        line.pop("pictures", None)
    assert found[0] == found[1]
    assert len(found[0]) == 30
    pictures = sorted(path.name for path in (tmp_path / "1").rglob("*.png"))
    assert len(pictures) == 29
    for name in pictures:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_killed_process_is_replaced_and_nothing_is_lost_or_doubled(bundle: Path, frames: Path) -> None:
    sources = find_sources([str(frames)])
    before = set(children())
    outcomes = score_in_processes(opener(bundle), sources, 2)
    found = [next(outcomes)]
    victims = [pid for pid in children() if pid not in before and is_worker(pid)]
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    found += list(outcomes)
    assert [item.frame.name for item in found] == [source.name for source in sources]
    assert sum(item.error is not None for item in found) == 1  # the file that is no image
    with opener(bundle)() as engine:
        for item in found:
            if item.result is not None:
                assert item.result.score == engine(read_image(item.frame.name)).score


def children() -> list[int]:
    """Processes that this one has started."""
    own = Path(f"/proc/{os.getpid()}/task")
    return [int(word) for task in own.iterdir() for word in (task / "children").read_text().split()]


def is_worker(pid: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_file_that_kills_its_process_gets_an_error_and_no_other_file_does(bundle: Path, tmp_path: Path) -> None:
    for index in range(9):
        frame = gray_frame(spot=(5, 5, 9, 9) if index == 4 else None)
        if index == 3:
            frame[0, 0] = 13
        save_png(tmp_path / f"{index}.png", frame)
    sources = find_sources([str(tmp_path)])
    found = list(score_in_processes(partial(open_deadly, bundle), sources, 2))
    assert [item.frame.name for item in found] == [source.name for source in sources]
    assert [index for index, item in enumerate(found) if item.error is not None] == [3]
    assert isinstance(found[3].error, BackendError)
    assert "died" in found[3].error.what
    assert [index for index, item in enumerate(found) if item.result and item.result.is_anomalous] == [4]


def test_results_come_back_whole(bundle: Path, frames: Path) -> None:
    sources = find_sources([str(frames / "003.png")])
    (found,) = score_in_processes(opener(bundle), sources, 1, keep_images=True)
    with opener(bundle)() as engine:
        expected = engine(found.frame.image)
    assert found.result is not None
    np.testing.assert_array_equal(found.result.anomaly_map, expected.anomaly_map)
    np.testing.assert_array_equal(found.result.mask, expected.mask)
    assert found.milliseconds is not None


def test_an_engine_that_does_not_open_says_why(frames: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No bundle"):
        list(score_in_processes(opener(tmp_path / "nothing"), find_sources([str(frames)]), 2))


def test_a_stop_gives_what_is_under_way(bundle: Path, frames: Path) -> None:
    stop = threading.Event()
    outcomes = score_in_processes(opener(bundle), find_sources([str(frames)]), 1, stop=stop)
    found = [next(outcomes)]
    stop.set()
    found += list(outcomes)
    assert 1 <= len(found) < 30


def none_is_left(group: int) -> None:
    """Waits until no process of a group is there."""
    end = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < end, "a process is still there"
        time.sleep(0.1)


def test_ctrl_c_ends_all_processes_in_order(bundle: Path, frames: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for index in range(2000):
        os.link(frames / "001.png", many / f"{index:04d}.png")
    words = [sys.executable, "-m", "saae_runtime.cli", bundle, many, "--processes", "2", "--json", tmp_path / "r.jsonl"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    log = tmp_path / "r.jsonl"
    end = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert 0 < len(told(log.read_text())) < 2000
    none_is_left(process.pid)


@pytest.mark.parametrize(
    ("words", "said"), [(("--watch",), "for image files"), (("--batch", "2"), "do not go together")]
)
def test_what_does_not_go_together(bundle: Path, frames: Path, words: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, [str(bundle), str(frames), "--processes", "2", *words])
    assert done.exit_code == 2
    assert said in done.output


def test_no_process_outlives_its_parent(bundle: Path, frames: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    shutil.copytree(frames, many)
    for index in range(3000):
        os.link(frames / "001.png", many / f"x{index:04d}.png")
    words = [sys.executable, "-m", "saae_runtime.cli", bundle, many, "--processes", "2", "--json", tmp_path / "r.jsonl"]
    process = subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not ((tmp_path / "r.jsonl").exists() and (tmp_path / "r.jsonl").stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    none_is_left(process.pid)
