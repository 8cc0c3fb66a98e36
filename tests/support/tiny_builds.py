"""A whole build at the smallest size: drawn images of 96 pixels, a tiny ViT with random weights, a handful of steps."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from tiny_models import TINY

from saae_export.pipeline.build import BuildOptions, BuildResult, build
from saae_export.pipeline.images import Request
from saae_train.config import FitConfig
from saae_train.data.demo import write_demo

CONFIG = FitConfig(
    backbone=TINY,
    layers=(1, 2),
    input_size=(64, 64),
    follow_shape=False,
    components=32,
    memory=64,
    latent=12,
    steps=6,
    batch=4,
    precision="fp32",
)

CLI = (
    "--backbone", TINY, "--weights", "random", "--layers", "1,2", "--input-size", "64x64", "--components", "32",
    "--latent", "12", "--steps", "6", "--batch", "4", "--set", "memory=64", "--fit-precision", "fp32",
    "--no-latency", "--engine", "none", "--parity-images", "2", "--no-selftest",
)  # fmt: skip
"""The same as options of `saae-export build`."""


@cache
def _drawn() -> dict[str, bytes]:
    """A small weave's files, drawn once: each picture takes as long as one of 512 pixels."""
    with TemporaryDirectory() as folder:
        root = write_demo(Path(folder), "weave", size=(96, 80), train=10, test_good=2, per_defect=1).root
        files = [path for path in root.rglob("*") if path.is_file() and path.name != ".saae-demo.json"]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def draw(root: Path) -> Path:
    """Puts a small drawn weave under `root`, without the stamp, so that it passes for photographs."""
    for name, content in _drawn().items():
        path = root / "weave" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def options(data: Path, folder: Path, **changes: object) -> BuildOptions:
    """Options of a tiny build whose every output lies below `folder`."""
    chosen: dict[str, object] = {
        "request": Request("weave", data),
        "out": folder / "bundle",
        "work": folder / "runs",
        "cache": folder / "cache",
        "config": CONFIG,
        "weights": "random",
        "engines": ("none",),
        "parity_images": 3,
        "measure_latency": False,
        "self_test": False,  # a random model sees nothing; tests of the self-test ask for it
    }
    return BuildOptions(**(chosen | changes))  # type: ignore[arg-type]


def quiet_build(chosen: BuildOptions) -> tuple[BuildResult, str]:
    """Builds; returns the result and what was printed."""
    console = Console(file=io.StringIO(), width=160, highlight=False)
    result = build(chosen, console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


class Enough(Exception):
    """Ends a build once it has come to what a test is about."""


def fitted_model(folder: Path) -> Path:
    """The folder of the one fitted model that builds with these options have left."""
    (found,) = (folder / "runs" / "weave" / "models").iterdir()
    return found
