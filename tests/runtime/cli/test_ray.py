"""A real Ray cluster of this machine says what one process says; an actor and a process are killed on the way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from needs import need
from saae_run import opener, told
from tiny_bundle import gray_frame
from typer.testing import CliRunner

from saae_runtime.cli.command import app
from saae_runtime.cli.pool import score_in_pool
from saae_runtime.cli.ray_pool import RayPool
from saae_runtime.errors import BundleError, ConfigError
from saae_runtime.render import save_png
from saae_runtime.sources.files import find_sources

pytestmark = [pytest.mark.slow, pytest.mark.needs("ray", "onnxruntime")]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for index in range(24):
        save_png(folder / f"{index:03d}.png", gray_frame(spot=(index, 10, 9, 14) if index % 3 == 0 else None))
    (folder / "015.png").write_bytes(b"no image")
    return folder


def test_no_cluster_there(bundle: Path, frames: Path) -> None:
    if need("ray").is_initialized():
        pytest.skip("this process is connected to one")
    started = time.monotonic()
    done = CliRunner().invoke(app, [str(bundle), str(frames), "--ray", "auto"])
    assert done.exit_code == 2
    assert "there is no cluster" in done.output
    assert time.monotonic() - started < 120


def test_the_same_lines_as_without(ray_cluster: None, bundle: Path, frames: Path) -> None:
    words = [str(bundle), str(frames), "--backend", "onnxruntime:cpu", "--threads", "1", "--json", "-"]
    alone = CliRunner().invoke(app, words)
    there = CliRunner().invoke(app, [*words, "--ray", "local", "--processes", "2"])
    assert there.exit_code == alone.exit_code == 1, there.output
    assert told(there.stdout) == told(alone.stdout)
    assert len(told(alone.stdout)) == 24


@pytest.mark.parametrize("victim", ["actor", "process"])
def test_a_killed_worker_costs_nothing(ray_cluster: None, bundle: Path, frames: Path, victim: str) -> None:
    ray = need("ray")
    sources = find_sources([str(frames)])
    pool = RayPool(opener(bundle), 2)
    outcomes = score_in_pool(pool, sources)
    found = [next(outcomes)]
    if victim == "actor":
        ray.kill(pool._actors[0])
    else:
        pid = ray.get(ray.remote(num_cpus=0)(lambda: os.getppid()).remote())
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        named = [int(word) for word in workers if b"_Worker" in Path(f"/proc/{word}/cmdline").read_bytes()]
        assert named
        os.kill(named[0], signal.SIGKILL)
    found += list(outcomes)
    assert [item.frame.name for item in found] == [source.name for source in sources]
    assert [index for index, item in enumerate(found) if item.error is not None] == [15]
    expected = [index for index in range(24) if index % 3 == 0 and index != 15]
    assert [index for index, item in enumerate(found) if item.result and item.result.is_anomalous] == expected


def test_an_engine_that_does_not_open_says_why(ray_cluster: None, frames: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No bundle"):
        list(score_in_pool(RayPool(opener(tmp_path / "nothing"), 1), find_sources([str(frames)])))


def test_more_than_the_cluster_has_is_refused(ray_cluster: None, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="10000 processes"):
        RayPool(opener(bundle), 10_000)
    with pytest.raises(ConfigError, match="GPU"):
        RayPool(opener(bundle), 1, gpus=100)
