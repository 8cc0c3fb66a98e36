"""bf16 is shipped where it decides as FP32 does; elsewhere it is left out and said, unless it was asked for."""

from __future__ import annotations

import dataclasses
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_builds import draw, options, quiet_build

from saae_export.artefacts import CPU, set_threshold
from saae_export.pipeline import measure, verdicts
from saae_export.pipeline.build import BuildResult
from saae_export.pipeline.measure import measure_quality
from saae_export.pipeline.quality import Quality
from saae_export.pipeline.verdicts import Judge, keep_verdicts
from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.bundle import Bundle, open_bundle, update_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import SimulationError
from saae_runtime.terminal import Stages
from saae_train.data.category import find_category
from saae_train.evaluation.evaluate import evaluate
from saae_train.evaluation.result import Evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, str]:
    return quiet_build(options(data, tmp_path_factory.mktemp("built"), precisions=("fp32",)))


def with_bf16(built: BuildResult, target: Path) -> Bundle:
    """A copy of the bundle with bf16, wherever it was built."""
    manifest = built.bundle.manifest
    fp32 = built.bundle.artefacts(precision="fp32")[0]
    artefacts = (fp32, dataclasses.replace(fp32, precision="bf16", parity=None))
    thresholds = dict.fromkeys(("fp32", "bf16"), manifest.thresholds["fp32"])
    changed = dataclasses.replace(manifest, artefacts=artefacts, thresholds=thresholds)
    return update_bundle(built.bundle, changed, {}, target=target)


class Judged(Judge):
    """FP32 calls every third of 200 images anomalous; the engine under test differs on `flips` of them."""

    def __init__(self, flips: int, fall: float = 0.0) -> None:
        self.flips, self.fall = flips, fall

    def reference(self, bundle: Bundle, stage: Any) -> Quality:
        return Quality("200 test images", 0.97, 0.92, tuple(place % 3 == 0 for place in range(200)))

    def quality(self, engine: Any, stage: Any) -> Quality:
        same = self.reference(engine, stage)
        decisions = tuple(value ^ (place < self.flips) for place, value in enumerate(same.decisions))
        return Quality(same.on, same.pixel_roc_auc, same.pro_auc - self.fall, decisions)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "open_artefact", lambda bundle, artefact: nullcontext())


def kept(bundle: Bundle, judge: Judge, *asked: str) -> tuple[Bundle, str]:
    console = Console(file=io.StringIO(), width=300)
    found = keep_verdicts(bundle, judge, asked, Stages(console, 1))
    return found, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("judge", "asked", "ships"),
    [
        (Judged(0), ("fp32",), True),
        (Judged(2), ("fp32",), True),
        (Judged(3), ("fp32",), False),
        (Judged(0, fall=0.004), ("fp32",), False),
        (Judged(3), ("fp32", "bf16"), True),
    ],
)
def test_what_is_shipped(
    built: tuple[BuildResult, str], tmp_path: Path, judge: Judged, asked: tuple[str, ...], ships: bool
) -> None:
    bundle, said = kept(with_bf16(built[0], tmp_path / "b"), judge, *asked)
    assert set(bundle.manifest.thresholds) == ({"fp32", "bf16"} if ships else {"fp32"})
    assert f"{judge.flips} of 200 decisions differ" in said
    again = open_bundle(bundle.path)
    assert again.manifest == bundle.manifest
    if ships:
        (artefact,) = again.artefacts(precision="bf16")
        assert artefact.options["gate"]["flips"] == judge.flips
    else:
        assert "--precision fp32,bf16" in said
    assert ("asked for and stays" in said) == (judge.flips > 2 and "bf16" in asked)
    assert again.artefacts(precision="fp32")


@pytest.mark.usefixtures("no_engine")
def test_without_anything_to_judge_on_parity_decides(built: tuple[BuildResult, str], tmp_path: Path) -> None:
    class Blank(Judged):
        def reference(self, bundle: Bundle, stage: Any) -> Quality:
            raise SimulationError("Nothing can be drawn.", "Blank images.", "")

    bundle, said = kept(with_bf16(built[0], tmp_path / "b"), Blank(0), "fp32")
    assert "bf16" in bundle.manifest.thresholds
    assert "not compared: Nothing can be drawn." in said


def test_a_bundle_without_bf16_stays_as_it_is(built: tuple[BuildResult, str]) -> None:
    bundle = built[0].bundle.only(built[0].bundle.artefacts(precision="fp32")[0])
    assert kept(bundle, Judged(0), "fp32")[0] is bundle


def test_each_graph_is_scored_once(
    built: tuple[BuildResult, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate and the evaluation share a pass; another file, precision or threshold is another graph."""
    category, fp32 = find_category(data, "weave"), built[0].bundle.artefacts(precision="fp32")[0]
    scored: list[str] = []

    def counted(engine: Engine, *words: Any, **options: Any) -> Evaluation:
        scored.append(engine.backend.precision)
        return evaluate(engine, *words, **options)

    monkeypatch.setattr(verdicts, "evaluate", counted)
    monkeypatch.setattr(measure, "deployed", lambda bundle: Engine(bundle, backend=CPU, verify=False, cache=False))
    judge, bundle = Judge(category, category.train), built[0].bundle.only(fp32)
    stages = Stages(Console(file=io.StringIO()), 3)
    with stages.stage("x") as stage:
        first = judge.reference(bundle, stage)
        assert judge.reference(bundle, stage) is first
    assert len(first.decisions) == len(category.test)
    found = measure_quality(bundle, judge, stages)
    assert found is not None
    assert scored == ["fp32"]
    assert tuple(image.score > (found.image_threshold or 0.0) for image in found.images) == first.decisions

    tables = bundle.manifest.thresholds["fp32"]
    higher = dataclasses.replace(tables, image=tables.image.scaled(1.5))
    other = update_bundle(
        bundle, dataclasses.replace(bundle.manifest, thresholds={"fp32": higher}), {}, target=tmp_path / "b"
    )
    with stages.stage("x") as stage:
        assert judge.reference(other, stage) is not first
        set_threshold(tmp_path / "b" / "model.onnx", 1.0)
        again = update_bundle(other, other.manifest, {"model.onnx": tmp_path / "b" / "model.onnx"})
        judge.reference(again, stage)
    assert scored == ["fp32"] * 3


def test_without_test_images_the_gate_draws_defects(built: tuple[BuildResult, str], data: Path) -> None:
    category = find_category(data, "weave")
    judge = Judge(dataclasses.replace(category, test=()), category.train)
    stages = Stages(Console(file=io.StringIO()), 1)
    assert measure_quality(built[0].bundle, judge, stages) is None
    with stages.stage("x") as stage:
        assert "simulated" in judge.reference(built[0].bundle, stage).on


def test_a_build_compares_the_verdicts_where_it_can(built: tuple[BuildResult, str]) -> None:
    """Which way it goes is the tiny model's affair."""
    result, said = built
    assert ("verdicts in bf16" in said) == (not bf16_missing())
    if "bf16" in result.bundle.manifest.thresholds:
        assert set(result.bundle.artefacts(precision="bf16")[0].options["gate"]) >= {"flips", "images"}
