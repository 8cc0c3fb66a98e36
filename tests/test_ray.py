"""A real Ray cluster of this machine says what processes of it say, also where an actor or a worker is killed.

One file, so that one worker of pytest has the one cluster.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fake_jobs
import pytest
from needs import need
from saae_run import ENVIRONMENT, opener, spawn, told
from tiny_bundle import gray_frame, make_tiny_bundle
from tiny_sets import TINY_CHANGES, write_square_set
from typer.testing import CliRunner

from saae_runtime.cli.command import app
from saae_runtime.cli.pool import score_in_pool
from saae_runtime.cli.ray_pool import RayPool
from saae_runtime.errors import BundleError, ConfigError, FitError, SaaeError
from saae_runtime.render import save_png
from saae_runtime.sources.files import find_sources
from saae_train.cli.options import make_config
from saae_train.experiments.experiment import Experiment
from saae_train.experiments.jobs import Job, Jobs, Processes, Workers
from saae_train.experiments.many import CategoryFit, fit_many, kept_fit
from saae_train.experiments.plan import Plan, ResultFolder, run_plan
from saae_train.experiments.ray_jobs import RayTasks

pytestmark = [pytest.mark.slow, pytest.mark.needs("ray", "onnxruntime", "timm")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


# --- saae-run ---


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
    for words, told_so in (
        (["--ray"], "No Ray cluster was found (auto)."),
        (["--ray-address", "nonsense"], "No Ray cluster was found (nonsense)."),
    ):
        done = CliRunner().invoke(app, [str(bundle), str(frames), *words], env={"RAY_ADDRESS": None})
        assert done.exit_code == 2
        said = " ".join(done.output.split())
        assert told_so in said
        assert "--ray-address local" in said
    assert time.monotonic() - started < 120


def test_the_same_lines_and_rows_as_without(ray_cluster: None, bundle: Path, frames: Path, tmp_path: Path) -> None:
    """In a process of its own, which finds the cluster as any program does."""
    words = [str(bundle), str(frames), "--backend", "onnxruntime:cpu", "--threads", "1", "--json", "-", "--out"]
    alone = CliRunner().invoke(app, [*words, str(tmp_path / "alone.parquet")])
    ours = {**ENVIRONMENT, "RAY_ADDRESS": need("ray").get_runtime_context().gcs_address}
    there = spawn(*words, tmp_path / "there.parquet", "--ray", "--processes", 2, env=ours)
    lines, said = (text.decode() for text in there.communicate(timeout=300))
    assert there.returncode == alone.exit_code == 1, said
    assert told(lines) == told(alone.stdout)
    assert len(told(alone.stdout)) == 24
    read = need("pyarrow.parquet").read_table
    tables = [read(tmp_path / name).drop_columns(["ms"]) for name in ("alone.parquet", "there.parquet")]
    assert tables[0].num_rows == 24
    assert tables[0].equals(tables[1])


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


def test_more_actors_than_the_cluster_has_are_refused(ray_cluster: None, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="10000 processes"):
        RayPool(opener(bundle), 10_000)
    with pytest.raises(ConfigError, match="GPU"):
        RayPool(opener(bundle), 1, gpus=100)


# --- tables and fit-many ---


def run(workers: Workers, *jobs: Job) -> tuple[list[Mapping[str, Any] | SaaeError], list[str]]:
    found: dict[int, Mapping[str, Any] | SaaeError] = {}
    died: list[str] = []
    left = list(enumerate(jobs))
    with Jobs(workers, lambda job, why: died.append(why)) as running:
        while left or running.keys:
            while left and running.has_room:
                place, job = left.pop(0)
                running.begin(place, job, lambda *now: None)
            place, outcome = running.next()
            assert place not in found
            found[place] = outcome
    return [found[place] for place in range(len(jobs))], died


def test_a_job_sees_what_it_would_see_here(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAAE_ALLOW_RANDOM", "yes")
    tasks = RayTasks()
    cores = int(need("ray").cluster_resources()["CPU"])
    assert (tasks.room, tasks.cpus, tasks.gpus) == (1, cores, 0)
    (seen, failed), died = run(tasks, Job("look", fake_jobs.surroundings, ""), Job("fail", fake_jobs.fails, None))
    assert seen["folder"] == str(tmp_path)
    assert seen["SAAE_ALLOW_RANDOM"] == "yes"
    assert seen["OMP_NUM_THREADS"] == str(cores)
    assert isinstance(failed, FitError)
    assert (failed.what, failed.cure) == ("The loss became nan.", "slower")
    assert died == []


def test_a_killed_worker_or_process_costs_a_second_try(ray_cluster: None, tmp_path: Path) -> None:
    """The process that fits, and then the cluster's own worker above it."""
    (tmp_path / "dies").mkdir()
    (tmp_path / "waits").mkdir()
    jobs = [
        Job("one", fake_jobs.dies, (str(tmp_path / "dies"), 1)),
        Job("two", fake_jobs.waits, str(tmp_path / "waits")),
    ]
    cluster = RayTasks(2)
    begin = cluster.begin
    begun: list[str] = []

    def kill_the_first(job: Job, report: Any) -> Any:
        value = begin(job, report)
        begun.append(job.name)
        if begun == ["one", "two"]:
            parent = tmp_path / "waits/parent-0"
            end = time.monotonic() + 60
            while not parent.exists() or not parent.read_text():
                assert time.monotonic() < end
                time.sleep(0.05)
            os.kill(int(parent.read_text()), signal.SIGKILL)
            (tmp_path / "waits/go").touch()
        return value

    cluster.begin = kill_the_first  # type: ignore[method-assign]
    found, died = run(cluster, *jobs)
    assert found == [{"attempts": 2}, {"number": 1}]
    assert sorted(died) == ["ended on the cluster (WorkerCrashedError)", "ended with code -9"]


def test_tables_are_what_processes_make_and_a_killed_worker_changes_nothing(ray_cluster: None, tmp_path: Path) -> None:
    write_square_set(tmp_path / "data", "bottle", train=6, good=1, bad=1)
    config = make_config("fast", **TINY_CHANGES)
    plan = Plan.make(tmp_path / "data", ["bottle"], config, tables=["2"], weights="random", device="cpu")
    died: list[str] = []
    folder = ResultFolder(tmp_path / "there", tmp_path / "data")
    there = run_plan(
        plan,
        folder,
        run=fake_jobs.measure_killed_once,
        workers=RayTasks(2, "cpu"),
        died=lambda job, why: died.append(why),
    )
    assert died == ["ended with code -9"]
    threads = RayTasks(2, "cpu").cpus
    here = run_plan(plan, ResultFolder(tmp_path / "here", tmp_path / "data"), workers=Processes(2, threads))
    assert list(map(known, there.values())) == list(map(known, (here[place] for place in there)))
    assert len(list((tmp_path / "there/experiments").iterdir())) == 1
    assert run_plan(plan, folder, run=fake_jobs.fails, workers=RayTasks(1, "cpu")) == there  # nothing is run again


def known(result: Any) -> dict[str, Any]:
    """A row without what the clock and the machine say."""
    row = {key: value for key, value in result.row.items() if "seconds" not in key and key != "peak_memory_gib"}
    return {**row, "facts": {key: value for key, value in row["facts"].items() if "seconds" not in key}}


def test_many_fits_are_what_one_makes(ray_cluster: None, tmp_path: Path) -> None:
    write_square_set(tmp_path / "data", "bottle", train=6, good=1, bad=1)
    config = make_config("fast", **TINY_CHANGES)
    made = []
    for name, workers in (("there", RayTasks(2, "cpu")), ("here", Processes(1, RayTasks(2, "cpu").cpus))):
        cache = str(tmp_path / f"cache-{name}")
        wanted = CategoryFit(
            Experiment(str(tmp_path / "data"), "bottle", config, "saae", "random", cache, "cpu"), str(tmp_path / name)
        )
        found = fit_many([wanted], workers)
        assert kept_fit(wanted) == found["bottle"]
        made.append((tmp_path / name / "bottle/checkpoint/model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_what_is_in_work_is_stopped_in_order(ray_cluster: None, tmp_path: Path) -> None:
    with Jobs(RayTasks(1)) as jobs:
        jobs.begin(0, Job("one", fake_jobs.endless, str(tmp_path)), lambda *now: None)
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
    assert (tmp_path / "stopped").exists()


def test_more_jobs_than_the_cluster_has_are_refused(ray_cluster: None) -> None:
    with pytest.raises(ConfigError, match="10000 processes"):
        RayTasks(10_000)
    with pytest.raises(ConfigError, match="GPU"):
        RayTasks(1, "cuda")
