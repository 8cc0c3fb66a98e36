"""Starting and ending: Ctrl-C at any moment, closed streams, loud libraries, threads that still compute."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endings import rest_of
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.render import save_png

need("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "saae_runtime.cli"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    save_png(path, gray_frame())
    return path


THREAD = """
import sys, threading, time
from saae_runtime.leave import leave
threading.Thread(target=time.sleep, args=(30,)).start()  # the interpreter would wait for it
leave({code!r})
"""


@pytest.mark.parametrize(("code", "expected"), [(7, 7), (None, 0), ("words", 1), (0, 0)])
def test_a_thread_that_still_works_does_not_change_the_exit_code(code: object, expected: int) -> None:
    done = subprocess.run([sys.executable, "-c", THREAD.format(code=code)], env=ENVIRONMENT, check=False, timeout=20)
    assert done.returncode == expected


BUSY = """
import sys, threading, time
import numpy as np
from saae_runtime import Engine
from saae_runtime.leave import leave
engine = Engine({bundle!r}, backend="onnxruntime:cpu", threads=1)
frame = np.full((700, 700, 3), 128, np.uint8)
def work():
    while True:
        engine(frame)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
leave(5)
"""


def test_a_process_that_ends_inside_an_engine_has_its_own_code(bundle: Path) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", BUSY.format(bundle=str(bundle))],
            env=ENVIRONMENT,
            check=False,
            timeout=60,
            capture_output=True,
        )
        assert done.returncode == 5, done.stderr


INTERRUPTED = """
import os, signal, sys
from importlib import abc
class Watcher(abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{number})
        return None
from saae_runtime.cli import main
sys.meta_path.insert(0, Watcher())
sys.argv = ["saae-run", {bundle!r}, {image!r}]
main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["typer", "rich.progress", "onnxruntime", "onnxruntime.capi", "PIL.ImageOps"])
def test_a_stop_while_starting_is_a_stop(bundle: Path, image: Path, module: str, number: str) -> None:
    code = INTERRUPTED.format(module=module, number=number, bundle=str(bundle), image=str(image))
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 128 + getattr(signal, number), done.stderr
    assert "Traceback" not in done.stderr
    assert "reinstall" not in done.stderr
    if module != "PIL.ImageOps":  # while frames are scored, a stop also has a summary
        assert done.stderr == "Stopped.\n"


LOUD = """
import ctypes, os, sys
from saae_runtime.cli import command
real = command.Engine
class Loud(real):
    def __init__(self, *arguments, **options):
        self.shout()
        super().__init__(*arguments, **options)
        self.shout()
    def shout(self):
        print("noise of Python")
        os.write(1, b"noise of a library\\n")
        ctypes.CDLL(None).puts(b"noise of C")
    def stream(self, *arguments, **options):
        self.shout()
        return super().stream(*arguments, **options)
command.Engine = Loud
sys.argv = ["saae-run", *sys.argv[1:]]
from saae_runtime.cli import main
main()
"""


@pytest.mark.parametrize("extra", [["--json", "-"], []])
def test_what_libraries_print_does_not_mix_with_the_results(bundle: Path, image: Path, extra: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOUD, str(bundle), str(image), *extra],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["score"] == 0 if extra else line.startswith("clean")
    for kind in ("Python", "a library", "C"):
        assert done.stderr.count(f"noise of {kind}") == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(bundle: Path, image: Path, tmp_path: Path, closed: str) -> None:
    log = tmp_path / "r.jsonl"
    shell = f"exec {sys.executable} -m saae_runtime.cli {bundle} {image} --backend onnxruntime:cpu"
    for extra, expected in ((f"--json {log}", 0), ("", 0)):
        done = subprocess.run(
            ["sh", "-c", f"{shell} {extra} {closed}"], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr
    (line,) = log.read_text().splitlines()
    assert json.loads(line)["source"] == str(image)


def test_a_file_does_not_take_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a library in C prints would end up in it."""
    code = (
        "import os, sys; from saae_runtime.leave import open_closed_streams; open_closed_streams(); "
        "number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT); os.write(number, str(number).encode())"
    )
    shell = f"exec {sys.executable} -c '{code}' {tmp_path / 'log'} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, check=True)
    assert int((tmp_path / "log").read_text()) > 2


def test_json_to_a_closed_standard_output_is_an_error(bundle: Path, image: Path) -> None:
    shell = f"exec {sys.executable} -m saae_runtime.cli {bundle} {image} --json - >&-"
    done = subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr


def test_a_reader_of_both_streams_that_goes(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    save_png(folder / "0.png", gray_frame())
    for index in range(1, 3000):
        os.link(folder / "0.png", folder / f"{index}.png")
    process = subprocess.Popen(
        [*COMMAND, str(bundle), str(folder), "--json", "-"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141


def test_a_reader_of_the_log_that_goes_stops_no_inspection(bundle: Path, tmp_path: Path) -> None:
    for index in range(30):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / f"{index:02d}.png").write_bytes(b"damaged")
    save_png(tmp_path / "f" / "99.png", gray_frame())
    with subprocess.Popen(
        [*COMMAND, str(bundle), str(tmp_path / "f"), "--json", "-"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stderr.close()
        lines = process.stdout.read().splitlines()
        assert process.wait(timeout=60) == 3
    assert len(lines) == 31
    assert "score" in json.loads(lines[-1])


def test_two_stops_end_a_run_whose_computation_takes_long(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "large", (1500, 2000))
    folder = tmp_path / "f"
    save_png(folder / "0.png", gray_frame((1500, 2000)))
    for index in range(1, 40):
        os.link(folder / "0.png", folder / f"{index}.png")
    arguments = [*COMMAND, str(bundle), str(folder), "--json", "-", "--threads", "1", "--backend", "onnxruntime:cpu"]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = rest_of(process, 60)
    assert process.returncode == 130, said
    assert b"terminate called" not in said


STARTING = """
import os, signal, sys
from saae_runtime.leave import start

def load():
    os.kill(os.getpid(), signal.SIGINT)  # inside an import
    print("not reached", flush=True)

start(load)
"""

STARTED = """
import os, signal
from saae_runtime.leave import start

def run():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise SystemExit(7)

start(lambda: run)
"""


def test_a_stop_while_a_command_is_loaded_ends_it_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


def test_a_stop_afterwards_is_the_commands_own() -> None:
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize("package", ["saae_train", "saae_export"])
def test_every_command_starts_so(package: str, repo_root: Path) -> None:
    """Ctrl-C comes while the command's own module is imported."""
    code = (
        "import os, signal, sys, importlib.abc\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == '{package}.cli.command': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"from {package}.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=repo_root
    )
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")
