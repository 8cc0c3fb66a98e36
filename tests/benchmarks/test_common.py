"""The benchmarks' shared helpers: what they write can be read, and their statistics are right."""

from __future__ import annotations

import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common


def test_result_file_says_where_the_numbers_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(common.ROOT / "benchmarks" / "quality.py")
    data_dir = str(common.ROOT.parent / "sets" / "images")
    monkeypatch.setattr(sys, "argv", [script, "--data", data_dir, "--out", str(tmp_path / "x.json")])
    rows = [{"what": "a", "ms": 1.5}]
    path = common.write_result(common.result("demo", rows, inside="nothing"), tmp_path / "deep" / "x.json")
    data = json.loads(path.read_text())
    assert data["benchmark"] == "demo"
    assert data["rows"] == rows
    assert data["inside"] == "nothing"
    assert data["command"] == "python benchmarks/quality.py --data images --out x.json"
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["memory_gib"] > 0
    assert data["versions"]["numpy"] == np.__version__
    assert str(common.ROOT) not in path.read_text()


def test_no_script_hides_a_library() -> None:
    """A script's own folder is the first that Python looks into: `triton.py` there would be PyTorch's `triton`."""
    optional = {"triton", "ray", "tritonclient", "onnxruntime", "openvino", "tensorrt"}  # imported where they are there
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) | optional
    scripts = {path.stem for path in (common.ROOT / "benchmarks").glob("*.py")}
    assert len(scripts) > 15
    assert not scripts & taken


def test_peak_memory_sees_what_the_block_held() -> None:
    with common.PeakMemory() as small:
        pass
    with common.PeakMemory() as large:
        np.ones(40_000_000, np.float64)
    assert large.gib >= small.gib
    if not large.since_start:
        assert large.gib > small.gib + 0.2


def test_table_prints_missing_values_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_table("Title", ["what", "n"], [("a", 0.123456), ("b", None), ("c", 12345.6)], ["a note"])
    out = capsys.readouterr().out
    for word in ("Title", "0.1235", "-", "12346", "a note"):
        assert word in out
