"""What every extra asks for exists and agrees, on the oldest and the newest Python, from the packages' own metadata.

Nothing is installed: the extras for a GPU alone are some gigabytes. tests/test_packaging.py installs the small ones and
uses them; the environment of the tests has others. NVIDIA keeps TensorRT's wheels on a server of its own, which is not
asked.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from needs import need

pytestmark = pytest.mark.slow

PC, JETSON = "x86_64-manylinux_2_31", "aarch64-manylinux_2_35"  # JetPack 6 is Ubuntu 22.04


def pythons(project: Path) -> list[str]:
    """The Pythons that the project names."""
    found = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project.read_text(encoding="utf-8"))
    return sorted(found, key=lambda version: int(version.split(".")[1]))


OLDEST, *_, NEWEST = pythons(Path(__file__).resolve().parents[1] / "pyproject.toml")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is read of the packages, shared by the tests."""
    return tmp_path_factory.mktemp("packages")


def resolved(project: Path, cache: Path, *extras: str, python: str, platform: str = PC) -> dict[str, str]:
    """The packages that an installation would have, with their versions; no extra: all of them."""
    chosen = [word for extra in extras for word in ("--extra", extra)] or ["--all-extras"]
    words = ["--no-header", "--no-annotate", "--no-python-downloads", "--no-config", "--cache-dir", str(cache)]
    target = ["--python-version", python, "--python-platform", platform]
    done = subprocess.run(
        [need("uv").find_uv_bin(), "pip", "compile", *words, *target, *chosen, str(project)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("UV_")},
        timeout=300,
    )
    reached = re.search(r"^.*Failed to fetch.*$", done.stderr, re.MULTILINE)
    if done.returncode == 2 and reached:
        pytest.skip(f"PyPI cannot be reached from here: {reached[0].strip()}")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("python", [OLDEST, NEWEST])
def test_all_extras_go_together(repo_root: Path, cache: Path, python: str) -> None:
    found = resolved(repo_root / "pyproject.toml", cache, python=python)
    assert {"numpy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "pycuda", "ray"} <= set(
        found
    )


@pytest.mark.parametrize(
    ("extra", "brings"),
    [
        ("cuda", ["onnxruntime-gpu", "nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-runtime", "cuda-bindings"]),
        ("tensorrt", ["tensorrt", r"tensorrt-cu\d+", "cuda-bindings", "cuda-core"]),
        ("tensorrt-rtx", ["tensorrt-rtx", r"tensorrt-rtx-cu\d+", "cuda-bindings", "cuda-core"]),
        ("pycuda", ["pycuda", "numpy"]),
    ],
)
def test_an_extra_for_a_gpu_brings_what_its_backend_calls(
    repo_root: Path, cache: Path, extra: str, brings: list[str]
) -> None:
    found = resolved(repo_root / "pyproject.toml", cache, extra, python=OLDEST)
    for name in brings:
        assert any(re.fullmatch(rf"{name}(-cu\d+)?", package) for package in found), (
            f"{name} is not among {sorted(found)}"
        )
    assert "torch" not in found


def test_a_jetson_gets_the_extras_that_need_no_graphics_driver(repo_root: Path, cache: Path) -> None:
    extras = ("cpu", "video", "watch", "triton", "parquet", "line", "modbus", "opcua", "serve")
    found = resolved(repo_root / "pyproject.toml", cache, *extras, python=OLDEST, platform=JETSON)
    assert {"onnxruntime", "tritonclient", "fastapi", "paho-mqtt", "tomli"} <= set(found)


def test_what_does_not_agree_is_no_solution(tmp_path: Path, cache: Path) -> None:
    """The check itself."""
    project = tmp_path / "pyproject.toml"
    lines = ["[project]", 'name = "x"', 'version = "1"', f'requires-python = ">={OLDEST}"', "dependencies = []"]
    extra = ["[project.optional-dependencies]", 'both = ["typer>=0.16", "rich<1"]']
    project.write_text("\n".join([*lines, *extra]), encoding="utf-8")
    with pytest.raises(AssertionError, match="No solution"):
        resolved(project, cache, python=NEWEST)
