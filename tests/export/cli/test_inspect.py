"""`saae-export inspect`: what a manifest says is shown as it is, whatever letters it has."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_bundle import tiny_graph, tiny_manifest

from saae_export.cli.inspect import print_bundle
from saae_runtime.bundle import write_bundle
from saae_runtime.manifest import Artefact

pytestmark = pytest.mark.needs("onnx")


@pytest.mark.parametrize("name", ["[/]", "[/red]", "[bold]x", "[link=file:///x]y"])
def test_markup_in_a_name_is_shown_and_not_obeyed(tmp_path: Path, name: str) -> None:
    file = f"{name.replace('/', '').replace(':', '')}.onnx"
    manifest = dataclasses.replace(
        tiny_manifest(),
        category=name,
        tools={name: name},
        metrics={name: name, "label": name, "self_test": {"found": {"found": name, "count": name}}},
        artefacts=(Artefact(file, "onnx", "fp32"), Artefact(file, "engine", "fp32", library=name, sm=name)),
    )
    bundle = write_bundle(tmp_path / "tiny", manifest, {file: tiny_graph()})
    stream = io.StringIO()
    print_bundle(bundle, Console(file=stream, width=300))
    assert stream.getvalue().count(name) >= 6
    assert file in stream.getvalue()
