"""The self-test inside a build: a seeing model passes and says so everywhere, a blind one is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from folders import copy_tree, leftovers
from PIL import Image
from rich.console import Console
from tiny_builds import CONFIG, options, quiet_build
from typer.testing import CliRunner

from saae_export.cli.inspect import print_bundle
from saae_export.pipeline.build import BuildResult, build
from saae_export.pipeline.images import Request
from saae_export.pipeline.summary import print_summary
from saae_runtime import Engine, open_bundle
from saae_runtime.errors import SelfTestError
from saae_train.cli.command import app
from saae_train.data.category import find_category
from saae_train.data.split import split_of
from saae_train.model.checkpoint import load_checkpoint, save_checkpoint
from saae_train.selftest.run import selftest

QUICK = {"self_test": True, "self_test_frames": 20, "precisions": ("fp32",), "parity_images": 2, "samples": 0}


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, str, Path]:
    folder = tmp_path_factory.mktemp("built")
    result, text = quiet_build(options(data, folder, **QUICK))
    return result, text, folder


@pytest.fixture(scope="module")
def blind(built: tuple[BuildResult, str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its eyes shut: the patch projection gives the same of every patch, and so does the map."""
    (model,) = (built[2] / "runs" / "weave" / "models").iterdir()
    checkpoint = load_checkpoint(model)
    projections = [
        value
        for name, value in checkpoint.detector.backbone.named_parameters()
        if name.endswith("patch_embed.proj.weight")
    ]
    assert len(projections) == 1
    projections[0].data.zero_()
    # What such a model says of its own images: the same of each.
    assert checkpoint.left_out is not None
    height, width = checkpoint.config.input_size
    with torch.no_grad():
        same = checkpoint.detector(torch.zeros(1, 3, height, width)).max()
    left_out = dataclasses.replace(
        checkpoint.left_out, scores=torch.full_like(checkpoint.left_out.scores, 1.5 * float(same))
    )
    checkpoint = dataclasses.replace(checkpoint, left_out=left_out)
    return save_checkpoint(tmp_path_factory.mktemp("blind") / "model", checkpoint)


def test_a_seeing_model_passes_and_its_numbers_are_called_simulated(built: tuple[BuildResult, str, Path]) -> None:
    result, text, folder = built
    assert result.self_test is not None
    assert result.self_test.judged
    assert not result.self_test.misses_easy
    assert "self-test (simulated defects)" in text
    assert "SIMULATED defects" in text
    found = open_bundle(folder / "bundle", verify=True).manifest.metrics["self_test"]
    assert found["simulated"] is True
    assert found["synthetic"] is False
    assert found == json.loads(json.dumps(result.self_test.summary()))
    report = (folder / "bundle" / "report.html").read_text(encoding="utf-8")
    section = report[report.index('<h2 id="self-test">') : report.index('<h2 id="thresholds">')]
    assert "simulated" in section
    assert 'alt="Simulated defects found"' in section
    assert section.count("<img") >= 1 + 4 * len(result.self_test.kinds)
    assert 'id="simulated"' in report

    console = Console(file=io.StringIO(), width=160)
    print_summary(result, console)
    print_bundle(result.bundle, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert f"SIMULATED defects found: {result.self_test.easy} large and strong" in shown
    assert f"{result.self_test.easy.found} of {result.self_test.easy.count} found" in shown


def test_the_numbers_are_those_of_the_bundle(built: tuple[BuildResult, str, Path], data: Path) -> None:
    """Drawn again and scored by the finished bundle: the same count."""
    result, _, folder = built
    assert result.self_test is not None
    (model,) = (folder / "runs" / "weave" / "models").iterdir()
    checkpoint = load_checkpoint(model)
    samples = split_of(checkpoint.record, checkpoint.config, find_category(data, "weave")).normal
    with Engine(folder / "bundle") as engine:
        again = selftest(engine, samples, threshold=engine.threshold, image_threshold=engine.image_threshold, frames=20)
    assert again.share() == result.self_test.share()
    assert again.easy == result.self_test.easy
    assert again.image_threshold == result.self_test.image_threshold


def test_a_blind_model_is_refused_and_nothing_is_written(
    blind: Path, built: tuple[BuildResult, str, Path], data: Path, tmp_path: Path
) -> None:
    folder = copy_tree(built[2], tmp_path / "again")
    before = open_bundle(folder / "bundle").manifest
    with pytest.raises(SelfTestError, match="blind") as caught:
        quiet_build(options(data, folder, checkpoint=blind, **QUICK))
    assert caught.value.exit_code == 3
    assert "--allow-blind" in caught.value.cure
    words = shlex.split(caught.value.cure.split("`")[1])
    assert words[:3] == ["saae-train", "selftest", str(blind)]
    typed = CliRunner().invoke(app, words[1:])
    assert typed.exit_code == 0, typed.output
    misses = Path(words[-1])
    assert (misses / "selftest.json").is_file()
    shutil.rmtree(misses)
    assert open_bundle(folder / "bundle", verify=True).manifest == before
    assert leftovers(folder) == []
    assert [path.name for path in (folder / "runs" / "weave").iterdir()] == ["models"]


def test_a_blind_model_can_be_asked_for(blind: Path, data: Path, tmp_path: Path) -> None:
    result, text = quiet_build(options(data, tmp_path, checkpoint=blind, allow_blind=True, **QUICK))
    assert "BLIND" in text
    assert result.self_test is not None
    assert result.self_test.easy.found == 0
    assert result.bundle.manifest.metrics["self_test"]["blind"] is True
    assert "<strong>Blind</strong>" in (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")


def test_without_a_self_test_a_blind_model_passes_unjudged(blind: Path, data: Path, tmp_path: Path) -> None:
    result, text = quiet_build(options(data, tmp_path, checkpoint=blind, **(QUICK | {"self_test": False})))
    assert result.self_test is None
    assert "self_test" not in result.bundle.manifest.metrics
    assert "not asked for" in text
    report = (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")
    assert "the self-test was not asked for" in report
    assert 'id="simulated"' not in report


def test_images_too_small_to_draw_on_are_no_fault_of_the_model(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    for path in sorted((data / "weave" / "train" / "good").iterdir()):
        Image.open(path).resize((24, 24)).save(folder / path.name)
    console = Console(file=io.StringIO(), width=160)
    # With the MLP of a texture, so that the graph is the one that other tests have exported.
    config = CONFIG.replace(mlp_ratio=1)
    request = Request("small", normal=(folder,))
    chosen = options(data, tmp_path, request=request, config=config, frame_size="model", **QUICK)
    result = build(chosen, console)
    assert result.self_test is None
    assert isinstance(console.file, io.StringIO)
    assert "too small to draw defects on" in console.file.getvalue()
