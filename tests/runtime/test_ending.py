"""The end of a process whose daemon threads are inside an engine: its own exit code, and no core dump."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import make_tiny_bundle

pytestmark = pytest.mark.needs("onnxruntime", "onnx")

_CALLS = """
def work():
    begun.set()
    while True:
        engine(frame)
"""
_STREAM = """
def work():
    begun.set()
    for _ in engine.stream(itertools.repeat(frame)):
        pass
"""
_OPEN = """
def work():
    begun.set()
    while True:
        saae_runtime.Engine(sys.argv[1], backend="onnxruntime:cpu", threads=1).close()
"""
_PROGRAM = """
import itertools, sys, threading, time
import numpy as np
import saae_runtime
engine = saae_runtime.Engine(sys.argv[1], backend="onnxruntime:cpu", threads=1)
frame = np.zeros((512, 512, 3), np.uint8)
begun = threading.Event()
{work}
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.2)
sys.exit(7)
"""


@pytest.mark.parametrize("work", [_CALLS, _STREAM, _OPEN], ids=["calls", "stream", "open"])
def test_the_process_ends_with_its_own_code(tmp_path: Path, repo_root: Path, work: str) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny", (512, 512))
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(work=work), str(bundle)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=repo_root,
        )
        assert (done.returncode, done.stderr) == (7, "")
