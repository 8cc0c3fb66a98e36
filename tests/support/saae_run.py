"""`saae-run` for tests: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from saae_runtime.cli.command import app
from saae_runtime.engine import Engine

SPOT = (10, 20, 9, 14)
"""Where frames of the tiny bundle have their defect: top, left, height, width."""
COMMAND = [sys.executable, "-m", "saae_runtime.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
    """The command in a process of its own, its output on pipes unless told."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **(pipes | options))


def told(text: str) -> list[dict[str, Any]]:
    """Its JSON lines, but for their times."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line.pop("ms", None)
    return lines


def opener(bundle: Path) -> partial[Engine]:
    """Opens an engine over a bundle, in whatever process."""
    return partial(Engine, bundle, backend="onnxruntime:cpu", threads=1)
