"""Standard output belongs to the caller: ONNX Runtime's prints go elsewhere, and its own fallback is off."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest
from tiny_bundle import make_tiny_bundle

from saae_runtime import Engine
from saae_runtime.backends.onnxruntime.quiet import import_onnxruntime, stdout_kept


def test_prints_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with stdout_kept():
        print("Failed to load libcublas.so")
    print("{}")
    assert capsys.readouterr() == ("{}\n", "Failed to load libcublas.so\n")


def test_a_program_without_streams_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with stdout_kept():
        print("lost")


def test_the_import_prints_nothing_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud(name: str) -> ModuleType:
        print(f"loading {name}")
        return ModuleType(name)

    monkeypatch.setattr("saae_runtime.backends.onnxruntime.quiet.importlib.import_module", loud)
    import_onnxruntime()
    assert capsys.readouterr() == ("", "loading onnxruntime\n")


def test_a_session_is_opened_without_fallback_and_without_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, given = onnxruntime.InferenceSession, []

    def session(*arguments: Any, **options: Any) -> Any:
        print("*************** EP Error ***************")
        given.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with Engine(make_tiny_bundle(tmp_path / "tiny"), backend="onnxruntime:cpu", threads=1):
        pass
    assert [options["enable_fallback"] for options in given] == [0]
    assert capsys.readouterr().out == ""
