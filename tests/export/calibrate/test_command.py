"""`saae-export calibrate` on a line PC without PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import fingerprint, leftovers

from saae_runtime.bundle import open_bundle

ROOT = Path(__file__).resolve().parents[3]


# --- the command, where only the runtime is installed ---

LEAN = """
import sys
for name in ("torch", "timm", "onnx", "onnxscript", "scipy", "jinja2", "safetensors", "huggingface_hub"):
    sys.modules[name] = None  # importing it is now an ImportError
from saae_export.cli import main
main()
"""


def _spawn(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LEAN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _run(*arguments: object) -> tuple[int, str, str]:
    with _spawn(*arguments) as process:
        out, log = process.communicate(timeout=120)
    return process.returncode, out, log


def test_the_command_on_a_line_pc(bundle: Path, pictures: Path) -> None:
    code, out, log = _run("calibrate", bundle, "--normal", pictures, "--dry-run")
    assert code == 0, log
    assert "Nothing was written." in log
    row = next(line for line in out.splitlines() if "fp32" in line)
    assert "9 of 9" in row
    assert "0 of 9" in row
    assert open_bundle(bundle).manifest.thresholds["fp32"].image.at() == 40.0

    code, out, log = _run(
        "calibrate", bundle, "--normal", pictures / "0.png", "--normal", f"{pictures}/[1-8].png",
        "--image-fpr", "0.2", "--precision", "fp32",
    )  # fmt: skip
    assert code == 0, log
    assert out.splitlines()[-1] == str(bundle)
    assert "fp16 (model.fp16.onnx) was removed from the bundle" in log
    table = open_bundle(bundle, verify=True).manifest.thresholds["fp32"].image
    assert table.default_fpr == 0.2
    assert f"{table.at():.5g}" in out
    code, out, log = _run("inspect", bundle)
    assert code == 0, log
    assert f"{table.at():.5g} (FPR 0.2)" in out


def test_errors_are_panels(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    code, out, log = _run("calibrate", bundle, "--normal", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "no such file or folder" in log
    assert "Traceback" not in log
    (pictures / "2.png").write_bytes(b"no picture")
    code, out, log = _run("calibrate", bundle, "--normal", pictures)
    assert code == 2
    assert "2.png" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_the_bundle_as_it_was(bundle: Path, pictures: Path, number: int) -> None:
    for index in range(9, 500):
        os.link(pictures / "0.png", pictures / f"{index}.png")
    before = fingerprint(bundle)
    with _spawn("calibrate", bundle, "--normal", pictures) as process:
        assert process.stderr is not None
        seen = ""
        deadline = time.monotonic() + 60
        while "calibrate fp32 50/" not in seen and time.monotonic() < deadline:
            seen += process.stderr.readline()
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, seen + rest
    assert "Stopped" in rest
    assert "Traceback" not in seen + rest
    assert fingerprint(bundle) == before
    assert leftovers(bundle.parent) == []
