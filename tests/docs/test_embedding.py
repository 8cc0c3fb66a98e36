"""The C++ program of docs/embedding.md gives the engine's score, where there are headers to compile it with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from doc_checks import ROOT
from tiny_bundle import gray_frame, make_tiny_bundle

pytestmark = pytest.mark.needs("onnx", "onnxruntime")


def test_the_program_in_cpp_agrees_with_the_engine(tmp_path: Path) -> None:
    home = Path(os.environ.get("ONNXRUNTIME_HOME", "/usr"))
    header = next(home.glob("include/**/onnxruntime_cxx_api.h"), None)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if header is None or compiler is None:
        pytest.skip("needs a C++ compiler and an unpacked release of ONNX Runtime: ONNXRUNTIME_HOME=DIR")
    text = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    (tmp_path / "judge.cpp").write_text(code, encoding="utf-8")
    folder = home / "lib"
    words = [compiler, "-std=c++17", "-Wall", "-Werror", f"-I{header.parent}", "judge.cpp", f"-L{folder}"]
    subprocess.run([*words, f"-Wl,-rpath,{folder}", "-lonnxruntime", "-o", "judge"], cwd=tmp_path, check=True)
    from saae_runtime import Engine

    bundle = make_tiny_bundle(tmp_path / "bundle")
    with Engine(bundle, backend="onnxruntime:cpu") as engine:
        for frame in (gray_frame(), gray_frame(spot=(10, 20, 9, 14))):
            (tmp_path / "frame.rgb").write_bytes(frame.tobytes())
            expected = engine(frame)
            height, width = expected.size
            place = [tmp_path / "judge", bundle / "model.onnx", "frame.rgb", height, width, expected.image_threshold]
            done = subprocess.run(
                [str(word) for word in place], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == int(expected.is_anomalous), done.stderr
            assert float(done.stdout.split()[1]) == pytest.approx(expected.score, rel=1e-5)
