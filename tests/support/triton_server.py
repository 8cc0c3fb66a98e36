"""A real Triton server on this machine's CPU: the binary that the package nvidia-pytriton carries, and what it runs in.

The binary has the Python backend alone. A backend in Python stands in for the one that runs ONNX, a documented feature
of Triton: what reads the configuration, forms batches, warms up and answers is the server itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from uv_install import uv_install

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "nvidia-pytriton==0.7.0"
VERSIONS = ((3, 10), (3, 11), (3, 12))
"""Pythons that have both a stub in the package and numpy 1."""

ONNX_STAND_IN = '''
"""Runs model.onnx by the package onnxruntime, as the onnxruntime backend does."""
import json, os
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        options = ort.SessionOptions()
        threads = json.loads(args["model_config"])["parameters"].get("intra_op_thread_count")
        if threads is not None:
            options.intra_op_num_threads = int(threads["string_value"])
        path = os.path.join(folder, "model.onnx")
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        frames = [pb_utils.get_input_tensor_by_name(request, "frame").as_numpy() for request in requests]
        maps, scores = self.session.run(["anomaly_map", "score"], {"frame": np.concatenate(frames)})
        responses, start = [], 0
        for request, part in zip(requests, frames):
            stop = start + len(part)
            found = {"anomaly_map": maps[start:stop], "score": scores[start:stop]}
            names = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(found[name])) for name in names]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = stop
        return responses
'''


@dataclass(frozen=True)
class Installed:
    """The server's binary and libraries, its backends, and the Python environment of its models."""

    binary: Path
    libraries: str
    backends: Path
    environment: Path


@dataclass(frozen=True)
class Serving:
    """A running server: its ports on this machine, its process and its log."""

    http: int
    grpc: int
    metrics: int
    process: subprocess.Popen[bytes]
    log: Path

    def url(self, protocol: str) -> str:
        return f"{protocol}://127.0.0.1:{getattr(self, protocol)}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block the server takes connections and never answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            state = Path(f"/proc/{self.process.pid}/stat")
            while state.read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.01)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def install(folder: Path) -> Installed:
    """Lays a server out below a folder; skips where the package cannot be had or does not run here."""
    version = sys.version_info[:2]
    if version not in VERSIONS or not sys.platform.startswith("linux"):
        pytest.skip("Triton's Python backend needs numpy 1, so Linux with Python 3.10 to 3.12")
    library = Path(str(sysconfig.get_config_var("LIBDIR"))) / f"libpython3.{version[1]}.so.1.0"
    if not library.exists():
        pytest.skip("Triton's Python backend needs Python's shared library, which this Python was built without")
    _install("--target", folder / "package", "--no-deps", PACKAGE)
    server = folder / "package" / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    stub = backends / "python" / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / f"3.{version[1]}" / stub.name, stub)
    for program in (stub, server / "bin" / "tritonserver"):
        program.chmod(0o755)
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(ONNX_STAND_IN)
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    _install("--python", environment / "bin" / "python", "numpy<2", "onnxruntime")
    packages = environment / "lib" / f"python3.{version[1]}" / "site-packages"
    (packages / "checkout.pth").write_text(f"{ROOT}\n")  # the runtime as it is here
    libraries = f"{library.parent}:{folder / 'package' / 'nvidia_pytriton.libs'}"
    return Installed(server / "bin" / "tritonserver", libraries, backends, environment)


def _install(*words: str | os.PathLike[str]) -> None:
    """By uv, which unpacks in a sixth of pip's time."""
    done = subprocess.run(uv_install(*words), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["uv failed"])[-1]
        pytest.skip(f"a Triton server cannot be installed here: {last}")


def in_environment(config: Path, environment: Path) -> None:
    """Has a model that stands in for another backend run in the server's Python environment."""
    value = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{environment}" }} }}\n'
    config.write_text(config.read_text() + value)


@contextmanager
def serve(
    installed: Installed, repository: Path, folder: Path, ports: Sequence[int] = (), timeout: float = 120
) -> Iterator[Serving]:
    """Runs a server on a repository until the block ends; all its models are ready. ports: HTTP, gRPC, metrics."""
    ports = ports or _free_ports(3)
    log = folder / "server.log"
    words = [
        installed.binary,
        f"--model-repository={repository}",
        f"--backend-directory={installed.backends}",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=3",  # else it waits 30 s for clients that keep their connection
        *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
        *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"LD_LIBRARY_PATH": installed.libraries, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        _wait_until_ready(process, ports[0], log, timeout)
        yield Serving(*ports, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"tritonserver ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"tritonserver is not ready after {timeout} s:\n{log.read_text()[-4000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
