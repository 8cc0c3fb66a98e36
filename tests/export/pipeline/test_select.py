"""`saae-export build --select`: the configurations, the one that is taken, and what the bundle says of it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_builds import CONFIG, Enough, draw, options, quiet_build

import saae_export.pipeline.build as build_module
import saae_export.pipeline.select as select
from saae_export.pipeline.select import CHOICES, choices_of
from saae_runtime import open_bundle
from saae_runtime.errors import ConfigError
from saae_train.config import preset
from saae_train.selftest.choose import Choice, Tried


def test_the_names() -> None:
    assert choices_of(None) == ()
    assert choices_of("auto") == tuple(CHOICES)
    assert choices_of("lite, joint,lite") == ("as given", "lite", "joint")
    for wrong in ("large", "", "lite,large"):
        with pytest.raises(ConfigError, match="--select"):
            choices_of(wrong)


def test_the_configurations_keep_what_was_given() -> None:
    given = preset("fast").replace(steps=77)
    made = {name: change(given) for name, change in CHOICES.items()}
    assert made["as given"] == given
    assert {config.steps for config in made.values()} == {77}
    assert made["lite"].layers == preset("lite").layers
    assert made["small"].input_size == preset("small").input_size
    assert made["fewer pixels"].layers == given.layers
    assert made["joint"].score == "joint"
    assert made["joint"].memory is None
    assert len({str(config.to_json()) for config in made.values()}) == len(CHOICES)


def test_a_build_takes_the_chosen_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model sees nothing, so the choice is made for it here; that it is fitted once and used is the point.

    Given is another model than the tests' usual one, and taken is that: its graph is one that was exported before.
    """
    seen: list[list[Tried]] = []

    def second(tried: list[Tried]) -> Choice:
        seen.append(tried)
        names = [item.name for item in tried]
        return Choice(names[1], dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0))

    few = {**CHOICES, "lite": lambda config: config.replace(layers=CONFIG.layers)}
    monkeypatch.setattr(select, "CHOICES", few)
    monkeypatch.setattr(select, "choose", second)
    given = CONFIG.replace(layers=(0, 1))
    names = ("as given", "lite", "joint")
    chosen = options(draw(tmp_path / "data"), tmp_path, config=given, select=names, self_test_frames=4)
    result, text = quiet_build(dataclasses.replace(chosen, precisions=("fp32",), samples=0))
    manifest = open_bundle(result.bundle.path).manifest
    assert tuple(manifest.model.layers) == CONFIG.layers == (1, 2)
    assert manifest.metrics["select"]["chosen"] == "lite"
    assert manifest.metrics["select"]["simulated"] is True
    assert [item.name for item in seen[0]] == ["as given", "lite", "joint"]
    assert [len(item.normal) for item in seen[0]] == [4, 4, 4]  # the same for all
    assert len({tuple(defect.recipe for defect in item.test.defects) for item in seen[0]}) == 1
    assert len(list((tmp_path / "runs" / "weave" / "models").iterdir())) == 4  # the chosen one again, on all images
    assert manifest.calibration.images == 10
    assert "taken: lite" in text

    def stop(*_: object) -> None:
        raise Enough

    monkeypatch.setattr(build_module, "_build_bundle", stop)
    for refit, reused in ((False, 4), (True, 0)):
        console = Console(file=io.StringIO(), width=160)
        with pytest.raises(Enough):
            build_module.build(dataclasses.replace(chosen, refit=refit), console)
        assert console.file.getvalue().count("fit: reused") == reused  # type: ignore[attr-defined]


def test_a_given_model_leaves_no_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--select and --checkpoint"):
        quiet_build(options(tmp_path, tmp_path, select=("as given", "lite"), checkpoint=tmp_path / "model"))
    assert CONFIG.score == "memory"
