"""The runtime stays lean: what importing it loads, and what it never needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import make_tiny_bundle

HEAVY = ("onnxruntime", "torch", "timm", "onnx", "scipy", "PIL", "typer", "rich", "cuda", "tensorrt", "saae_train")


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
