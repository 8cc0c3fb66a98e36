"""`auto` takes what is fastest here: fake backends of known speed under a clock that they move themselves."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_backends import (
    PASSED,
    SIZE,
    FakeBackend,
    World,
    again,
    bundle_at,
    chosen,
)
from needs import need
from tiny_bundle import make_tiny_bundle

from saae_runtime import Bundle, Engine, backends, files, open_bundle
from saae_runtime.backends import cache, machine, timing
from saae_runtime.backends.base import RawOutputs
from saae_runtime.backends.timing import BUDGET
from saae_runtime.bundle import update_bundle
from saae_runtime.errors import BackendUnavailableError, ConfigError, DeviceError, StorageError
from saae_runtime.locks import turn


def test_the_fastest_is_taken_whatever_the_order(world: World, bundle: Bundle) -> None:
    assert chosen(bundle) == ("swift", "bf16")
    assert world.still_open == 0
    world.speeds["swift", "bf16"] = 9.0  # not timed again: the figures are known
    assert chosen(bundle) == ("swift", "bf16")
    assert world.frames() == 4 + 1 + 1


@pytest.mark.parametrize(
    ("fastest", "expected"),
    [
        (("slow", "fp32"), ("slow", "fp32")),
        (("swift", "fp32"), ("swift", "fp32")),
        (("steady", "fp32"), ("steady", "fp32")),
    ],
)
def test_each_can_win(world: World, bundle: Bundle, fastest: tuple[str, str], expected: tuple[str, str]) -> None:
    world.speeds[fastest] = 0.001
    assert chosen(bundle) == expected


def test_quick_ways_are_warm_before_they_are_timed(world: World, bundle: Bundle) -> None:
    """The first frames of a GPU are slow: they count neither for a way nor against it."""
    world.speeds["swift", "fp32"], cold = 0.01, {}

    def run(backend: FakeBackend, frames: np.ndarray, threshold: float) -> RawOutputs:
        key = (backend.name, backend.precision)
        cold[key] = cold.get(key, 0) + 1
        world.now += 0.05 if key == ("swift", "fp32") and cold[key] < 2 else 0.0
        return infer(backend, frames, threshold)

    infer = FakeBackend.infer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBackend, "infer", run)
        figures = backends.measure(bundle)
    assert figures is not None
    assert [row.ms for row in figures.rows if (row.backend, row.precision) == ("swift", "fp32")] == [
        pytest.approx(10.0)
    ]
    assert figures.fastest()[0].precision == "fp32"


def test_explain_shows_the_figures(world: World, bundle: Bundle) -> None:
    world.speeds["steady", "fp32"] = BackendUnavailableError("It does not load.", "a library is missing")
    with Engine(bundle) as engine:
        lines = engine.explain().splitlines()
    assert lines[0] == "fake swift"
    assert "  slow: works: model.onnx; fp32 300 ms" in lines
    assert "* swift: in use: model.onnx; bf16 40 ms, fp32 100 ms" in lines
    assert lines[-1].startswith("  timed here on 20")
    assert lines[-1].endswith("; steady fp32 not timed: It does not load. a library is missing")
    assert [line.split(":")[0].strip("* ") for line in lines[1:4]] == ["slow", "steady", "swift"]


def test_the_next_process_finds_the_figures_beside_the_bundle(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "saae_runtime"):
        chosen(bundle)
        assert ["timing 4 ways" in record.getMessage() for record in caplog.records] == [True]
        caplog.clear()
        world.frames()
        again(monkeypatch)
        assert chosen(bundle) == ("swift", "bf16")
        assert caplog.records == []  # said once
    assert world.frames() == 1
    (file,) = bundle.path.with_name("tiny.cache").rglob("speed-*.json")
    assert [row["ms"] for row in json.loads(file.read_text())["rows"]] == [40.0, 300.0, 200.0, 100.0]
    assert not list(bundle.path.rglob("speed-*"))


def _other_processor(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    real = machine._read
    text = "model name : Another\nflags : sse2\n"
    patch.setattr(machine, "_read", lambda path: text if path == "/proc/cpuinfo" else real(path))


def _fewer_cores(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    patch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(77)), raising=False)


def _other_library(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    patch.setitem(machine.sys.modules, "swift", SimpleNamespace(__version__="2.0"))  # type: ignore[arg-type]


def _other_saae(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    patch.setattr(backends, "saae_version", lambda: "99.0")


def _other_graph(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    bundle_at(folder, b"another graph")


def _another_backend(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    world.speeds["slow", "bf16"] = 0.5


def _kernels_held_back(patch: pytest.MonkeyPatch, world: World, folder: Path) -> None:
    patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.mark.parametrize(
    "change",
    [
        _other_processor,
        _fewer_cores,
        _other_library,
        _other_saae,
        _other_graph,
        _another_backend,
        _kernels_held_back,
    ],
)
def test_no_choice_outlives_what_it_rests_on(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    """Timed again in the next process and in this one, and never the choice of before."""
    assert chosen(bundle) == ("swift", "bf16")
    world.speeds["swift", "bf16"], world.speeds["steady", "fp32"] = 0.5, 0.01
    change(monkeypatch, world, bundle.path)
    world.frames()
    assert chosen(open_bundle(bundle.path)) == ("steady", "fp32")
    assert world.frames() >= 4
    again(monkeypatch)
    assert chosen(open_bundle(bundle.path)) == ("steady", "fp32")
    assert world.frames() == 1


def test_figures_of_other_machines_stay_beside(world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle on a disk that machines share, and engines with other options."""
    chosen(bundle)
    with monkeypatch.context() as patch:
        _other_processor(patch, world, bundle.path)
        world.speeds["slow", "fp32"] = 0.001
        assert chosen(bundle) == ("slow", "fp32")
    again(monkeypatch)
    assert chosen(bundle) == ("swift", "bf16")
    assert chosen(bundle, threads=1) == ("slow", "fp32")  # with one thread nothing has been timed yet
    assert len(list(bundle.path.with_name("tiny.cache").rglob("speed-*.json"))) == 3


def test_what_failed_its_comparison_is_never_chosen_for_its_speed(world: World, tmp_path: Path) -> None:
    failed = dataclasses.replace(PASSED, passed=False)
    bundle = open_bundle(bundle_at(tmp_path / "b", parity={"bf16": failed}))
    assert chosen(bundle) == ("swift", "fp32")
    assert ("swift", "bf16") not in world.opened


def test_a_verdict_that_comes_later_is_obeyed(world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(bundle) == ("swift", "bf16")
    artefacts = tuple(
        dataclasses.replace(item, parity=dataclasses.replace(PASSED, passed=item.precision != "bf16"))
        for item in bundle.manifest.artefacts
    )
    changed = update_bundle(bundle, dataclasses.replace(bundle.manifest, artefacts=artefacts), {})
    assert chosen(changed) == ("swift", "fp32")


def test_a_precision_that_is_asked_for_bounds_the_choice(world: World, bundle: Bundle) -> None:
    assert chosen(bundle, precision="fp32") == ("swift", "fp32")
    assert ("swift", "bf16") not in world.opened


def test_a_backend_that_is_asked_for_is_opened_and_nothing_timed(world: World, bundle: Bundle) -> None:
    with Engine(bundle, backend="steady") as engine:
        assert engine.backend.name == "steady"
        assert world.opened == [("steady", None)]
        assert "not timed, so auto goes by a fixed order: nothing has been timed here yet" in engine.explain()


@pytest.mark.parametrize("how", ["argument", "environment", "no folder", "arithmetic"])
def test_without_measuring_the_order_is_fixed(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options: dict[str, object] = {
        "argument": {"measure": False},
        "environment": {},
        "no folder": {"cache": False},
        "arithmetic": {"arithmetic": "f32"},
    }[how]
    if how == "environment":
        monkeypatch.setenv("SAAE_MEASURE", "0")
    with Engine(bundle, **options) as engine:  # type: ignore[arg-type]
        assert engine.backend.name == "slow"
        assert "swift: works, slower: model.onnx" in engine.explain()
        assert "fixed order: " in engine.explain()
    assert world.frames() == 1
    assert not list(bundle.path.parent.rglob("speed-*"))


def test_the_argument_is_above_the_environment(world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAAE_MEASURE", "0")
    assert chosen(bundle, measure=True) == ("swift", "bf16")
    with pytest.raises(ConfigError, match="measure='no' is not possible"):
        Engine(bundle, measure="no")


def test_a_bundle_that_may_not_be_written_beside(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny.cache").write_text("a file in the way, since root may write anywhere")
    assert chosen(bundle) == ("swift", "bf16")
    (file,) = (tmp_path / "home").rglob("speed-*.json")
    assert chosen(bundle) == ("swift", "bf16")
    # And where the user has no folder either: the fixed order, without a word of complaint.
    again(monkeypatch)
    file.unlink()
    monkeypatch.setattr(cache, "user_cache", lambda: None)
    with Engine(bundle) as engine:
        assert engine.backend.name == "slow"
        assert "there is no folder to keep timings in" in engine.explain()


def test_figures_that_cannot_be_written_hold_in_this_process(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(timing, "write_json", full)
    assert chosen(bundle) == ("swift", "bf16")
    world.frames()
    assert chosen(bundle) == ("swift", "bf16")
    assert world.frames() == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"key": {}, "date": "2026", "rows": []}',
        "other key",
        "no rows",
        "a time that is none",
        "no number",
    ],
)
def test_a_damaged_file_is_timed_again(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    chosen(bundle)
    (file,) = bundle.path.with_name("tiny.cache").rglob("speed-*.json")
    data = json.loads(file.read_text())
    if text == "other key":
        data["key"]["device"] = 5
    elif text == "no rows":
        data["rows"] = []
    elif text == "a time that is none":
        data["rows"][0]["ms"] = -1.0
    elif text == "no number":
        data["rows"][0]["ms"] = "fast"
    file.write_text(text if text.startswith(("{", "[")) or not text else json.dumps(data))
    again(monkeypatch)
    world.frames()
    world.speeds["steady", "fp32"] = 0.001
    assert chosen(bundle) == ("steady", "fp32")
    assert world.frames() == 5


def test_what_fails_while_it_is_timed_is_left_out(world: World, bundle: Bundle) -> None:
    world.speeds["swift", "bf16"] = DeviceError("The device is lost.", "unplugged")
    assert chosen(bundle) == ("swift", "fp32")
    assert world.still_open == 0


def test_a_fault_of_the_fastest_after_it_was_timed_leaves_the_next(world: World, bundle: Bundle) -> None:
    chosen(bundle)
    world.speeds["swift", "bf16"] = BackendUnavailableError("It does not load.", "a library went away")
    with pytest.warns(UserWarning, match="swift is passed over.*went away"):
        assert chosen(bundle) == ("swift", "fp32")


def test_where_nothing_can_be_timed_the_error_names_all(world: World, bundle: Bundle) -> None:
    for name in world.speeds:
        world.speeds[name] = BackendUnavailableError(f"{name[0]} is broken.", "badly")
    with (
        pytest.warns(UserWarning, match="(slow|steady|swift) is passed over"),
        pytest.raises(BackendUnavailableError, match="No backend can run") as caught,
    ):
        Engine(bundle)
    assert all(f"{name} is broken" in caught.value.why for name in ("slow", "steady", "swift"))


def test_stopped_while_timing_nothing_is_kept_or_left_open(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.speeds["steady", "fp32"] = KeyboardInterrupt()  # type: ignore[assignment]
    monkeypatch.setattr(FakeBackend, "infer", _interrupted(FakeBackend.infer))
    with pytest.raises(KeyboardInterrupt):
        Engine(bundle)
    assert world.still_open == 0
    assert not list(bundle.path.parent.rglob("speed-*"))
    world.speeds["steady", "fp32"] = 0.01
    assert chosen(bundle) == ("steady", "fp32")


def _interrupted(infer: Callable[..., RawOutputs]) -> Callable[..., RawOutputs]:
    def stopping(self: FakeBackend, frames: np.ndarray, threshold: float) -> RawOutputs:
        if isinstance(self.speed, KeyboardInterrupt):
            raise self.speed
        return infer(self, frames, threshold)

    return stopping


def test_slow_machines_end_in_time(world: World, bundle: Bundle) -> None:
    """The likely fastest ways are first; what there was no time for is said, and was not opened."""
    for name in world.speeds:
        world.speeds[name] = BUDGET / 4
    world.speeds["slow", "fp32"] = BUDGET / 3
    figures = backends.measure(bundle)
    assert figures is not None
    assert world.now < 2 * BUDGET
    assert [(row.backend, row.precision) for row in figures.rows][:2] == [("swift", "bf16"), ("slow", "fp32")]
    assert [row.why for row in figures.rows if row.ms is None] == ["no time was left"] * 2
    assert world.frames() == 2


def test_the_hopeless_are_run_once(world: World, bundle: Bundle) -> None:
    world.speeds["swift", "bf16"] = 0.25
    world.speeds["slow", "fp32"] = 0.6
    world.speeds["swift", "fp32"] = 0.11
    before = world.now
    backends.measure(bundle, precision=None)
    spent = 3 * 0.25 + 0.6 + 3 * 0.2 + 5 * 0.11
    assert world.now - before == pytest.approx(spent)


def test_a_pipeline_is_timed_full(world: World, bundle: Bundle) -> None:
    """With several batches in flight a frame's share of the time counts."""
    world.slots = 4
    figures = backends.measure(bundle)
    assert figures is not None
    assert {(row.backend, row.precision): row.ms for row in figures.rows} == {
        ("swift", "bf16"): pytest.approx(40.0),
        ("slow", "fp32"): pytest.approx(300.0),
        ("steady", "fp32"): pytest.approx(200.0),
        ("swift", "fp32"): pytest.approx(100.0),
    }


def test_measured_for_a_staged_bundle_holds_for_the_final_one(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build times once: files of the report come later, the graph is the same."""
    assert backends.measure(bundle, cache=False) is not None
    assert not list(tmp_path.rglob("speed-*"))
    world.frames()
    assert chosen(bundle, cache=False) == ("swift", "bf16")
    final = update_bundle(bundle, bundle.manifest, {"report.html": b"page"}, target=tmp_path / "final")
    kept = backends.measure(final)
    assert kept is not None
    assert kept.place is not None
    assert kept.place.is_relative_to(tmp_path / "final.cache")
    again(monkeypatch)
    assert chosen(final) == ("swift", "bf16")
    assert world.frames() == 2


def test_threads_that_open_at_once_time_once(world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str]] = []
    all_there, real = threading.Barrier(4), timing.turn

    @contextmanager
    def together(lock: Path | None, seconds: float) -> Iterator[bool]:
        all_there.wait(30)  # none has found figures
        with real(lock, seconds) as mine:
            yield mine

    monkeypatch.setattr(timing, "turn", together)
    threads = [threading.Thread(target=lambda: found.append(chosen(bundle))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("swift", "bf16")] * 4
    assert world.frames() == 4 + 4


def test_who_waits_in_vain_goes_by_the_fixed_order(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "_WAIT", 0.0)
    with turn(tmp_path / "home" / "saae" / "timing.lock", 0.0) as mine:
        assert mine
        assert chosen(bundle)[0] == "slow"
    assert world.frames() == 1
    assert chosen(bundle) == ("swift", "bf16")


def _open_there(folder: str, lock: object, answers: object) -> None:
    import logging
    import os

    os.environ.pop("SAAE_MEASURE", None)
    said: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("saae_runtime").addHandler(Told())
    lock.wait()  # type: ignore[attr-defined]
    with Engine(folder) as engine:
        answers.put((engine.backend.name, len(said)))  # type: ignore[attr-defined]


@pytest.mark.needs("onnxruntime")
@pytest.mark.skipif(files.fcntl is None, reason="needs file locks")
def test_processes_that_start_at_once_time_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: one of three times the real backends, the others take its figures."""
    need("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = make_tiny_bundle(tmp_path / "tiny", SIZE)
    spawn = multiprocessing.get_context("spawn")
    lock, answers = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_open_there, args=(str(folder), lock, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len({name for name, _ in found}) == 1
    assert sum(said for _, said in found) == 1
    assert len(list((tmp_path / "tiny.cache").rglob("speed-*.json"))) == 1
