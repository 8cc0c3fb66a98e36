"""What a test hears from a process is all that the process said."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from endings import rest_of


def begin(words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", words], stdout=pipe, stderr=pipe, text=True)


def test_what_was_read_ahead_is_kept() -> None:
    words = "import sys; sys.stderr.write('1\\n2\\n'); sys.stderr.close(); print('a\\nb\\nc')"
    with begin(words) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a\n"
        assert process.stderr.readline() == "1\n"
        assert rest_of(process, 60) == ("b\nc\n", "2\n")


def test_one_that_lives_on_is_killed() -> None:
    with begin("import time; time.sleep(600)") as process, pytest.raises(subprocess.TimeoutExpired):
        rest_of(process, 0.2)
    assert process.returncode


def called(function: ast.FunctionDef) -> set[str]:
    """The names of the methods that it calls."""
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {method.attr for method in calls if isinstance(method, ast.Attribute)}


def test_no_test_reads_lines_and_then_communicates(repo_root: Path) -> None:
    """For `communicate()` forgets what `readline()` has read ahead."""
    for file in sorted((repo_root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert not {"readline", "communicate"} <= called(node), f"{file}: {node.name}"
