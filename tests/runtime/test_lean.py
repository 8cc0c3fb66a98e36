"""The runtime stays lean: what importing it loads, and what it never needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need
from tiny_bundle import gray_frame, make_tiny_bundle

from saae_runtime.render import save_png

HEAVY = (
    "onnxruntime",
    "openvino",
    "torch",
    "timm",
    "onnx",
    "scipy",
    "PIL",
    "typer",
    "rich",
    "cuda",
    "tensorrt",
    "saae_train",
)


def run(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


def test_import_loads_numpy_alone(repo_root: Path) -> None:
    code = f"import sys, saae_runtime; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = run(code, repo_root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [(16, 24), (20, 30)])
def test_scores_a_frame_without_the_training_side(repo_root: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    folder = make_tiny_bundle(tmp_path / "b", (16, 24))
    code = f"""
import sys
for name in ("torch", "timm", "onnx", "scipy", "saae_train", "saae_export", "typer", "rich"):
    sys.modules[name] = None  # importing it is now an ImportError
import numpy as np
from saae_runtime import Engine
with Engine({str(folder)!r}, backend="onnxruntime:cpu") as engine:
    result = engine(np.full(({size[0]}, {size[1]}, 3), 200, np.uint8))
    result.heatmap(), result.regions()
    print(result.score)
"""
    done = run(code, repo_root)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(72.0)


def test_public_names_exist(repo_root: Path) -> None:
    done = run(
        "from saae_runtime import *; Engine, Result, Region, Bundle, open_bundle, SaaeError, Manifest", repo_root
    )
    assert done.returncode == 0, done.stderr


_ENTRIES = {
    "engine": "from saae_runtime import Engine; e = Engine({bundle!r}, backend='onnxruntime:cpu'); e.close()",
    "saae-run": "import sys; sys.argv = ['saae-run', {bundle!r}, {image!r}, '--backend', 'onnxruntime:cpu']; "
    "from saae_runtime.cli import main; main()",
    "saae-train": "from saae_train.cli import main; import onnxruntime",
    "saae-export": "from saae_export.cli import main; import onnxruntime",
}


@pytest.mark.parametrize("entry", _ENTRIES)
def test_onnx_runtime_leaves_nothing_in_the_home_folder(repo_root: Path, tmp_path: Path, entry: str) -> None:
    need("onnxruntime")
    if entry in ("saae-train", "saae-export"):
        need("torch")
    home, bundle, image = tmp_path / "home", tmp_path / "b", tmp_path / "x.png"
    home.mkdir()
    make_tiny_bundle(bundle, (16, 24))
    save_png(image, gray_frame((16, 24)))
    code = _ENTRIES[entry].format(bundle=str(bundle), image=str(image))
    places = ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in places}
    environment |= {"HOME": str(home), "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = [str(path) for path in home.rglob("*") if "onnxruntime" in str(path).lower() or "Microsoft" in str(path)]
    assert left == []


def test_the_owner_of_the_machine_may_say_otherwise(repo_root: Path) -> None:
    for given, expected in ((None, "1"), ("0", "0")):
        environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        environment |= {"PYTHONPATH": str(repo_root)} | ({} if given is None else {"ORT_DISABLE_TELEMETRY": given})
        code = "import os, saae_runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    FILE *log = fopen(getenv("LOOKED_UP"), "a");
    if (log) { fprintf(log, "%s\n", node ? node : "-"); fclose(log); }
    return EAI_NONAME;
}
"""


@pytest.mark.slow
def test_onnx_runtime_looks_no_host_up(repo_root: Path, tmp_path: Path) -> None:
    """The library's first look-up comes some ten seconds after a session was opened."""
    need("onnxruntime")
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, to see look-ups")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c"], check=True)
    bundle = make_tiny_bundle(tmp_path / "b", (16, 24))
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {
        "HOME": str(tmp_path),
        "PYTHONPATH": str(repo_root),
        "LD_PRELOAD": str(tmp_path / "shim.so"),
        "LOOKED_UP": str(tmp_path / "hosts"),
    }
    code = f"""
import socket, time
from saae_runtime import Engine
try:
    socket.getaddrinfo("seen.invalid", 80)
except OSError:
    pass
with Engine({str(bundle)!r}, backend="onnxruntime:cpu"):
    time.sleep(16)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hosts").read_text().splitlines() == ["seen.invalid"]
