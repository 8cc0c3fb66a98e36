"""`saae-export build --select`: the configurations, the one that is taken, and what the bundle says of it."""

from __future__ import annotations

import dataclasses
import io
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console
from tiny_builds import CONFIG, Enough, draw, options, quiet_build

import saae_export.pipeline.build as build_module
import saae_export.pipeline.select as select
from saae_export.pipeline.select import AUTO, CHOICES, choices_of, possible_configs
from saae_runtime import open_bundle
from saae_runtime.errors import ConfigError
from saae_train.cli.options import make_config
from saae_train.config import PRESETS, FitConfig, preset
from saae_train.fitting.backbone import check_geometry
from saae_train.model.vit import patch_size
from saae_train.selftest.choose import Choice, Tried


def test_the_names() -> None:
    assert choices_of(None) == ()
    assert choices_of(" auto") == (AUTO,)
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


@pytest.mark.parametrize("name", PRESETS)
def test_all_that_auto_tries_can_be_fitted_and_no_two_are_the_same(name: str) -> None:
    given = preset(name)
    found, left = possible_configs(given, (AUTO,), 9)
    assert next(iter(found)) == "as given"
    assert found["as given"] == given
    assert list(found | left) != ["as given"]
    assert set(found) | set(left) == set(CHOICES)
    assert len({str(config.to_json()) for config in found.values()}) == len(found)
    step = patch_size(given.backbone) or 32
    for key, config in found.items():
        assert [side % step for side in config.input_size] == [0, 0]
        if key not in ("as given", "joint"):
            assert max(config.input_size) < max(given.input_size)
    with pytest.raises(ConfigError, match=r"^--select (lite|small|joint) is not possible") if left else nullcontext():
        possible_configs(given, tuple(CHOICES), 9)  # all by their names


@pytest.mark.parametrize(
    ("given", "sizes", "left"),
    [
        (preset("fast"), {"fewer pixels": (280, 280), "lite": (280, 280), "small": (224, 224)}, {}),
        (make_config("fast", input_size=(224, 336)), {"fewer pixels": (182, 280), "small": (154, 224)}, {}),
        (preset("paper"), {"lite": (320, 320)}, {"small": "no layers for vit_base", "joint": "needs components"}),
        (preset("bank"), {"lite": (280, 280)}, {"joint": "0 steps"}),
        (preset("lite"), {"fewer pixels": (238, 238), "small": (182, 182)}, {"lite": "same as `fewer pixels`"}),
        (preset("vgg19"), {"fewer pixels": (224, 224)}, {"lite": "no layers for vgg19", "joint": "", "small": ""}),
        (make_config("fast", input_size=(336, 336), saae_patch=3), {"fewer pixels": (294, 294)}, {}),
        (CONFIG, {"fewer pixels": (48, 48)}, {"lite": "no layers for vit_tiny", "small": "no layers"}),
    ],
)
def test_choices_follow_what_was_given(
    given: FitConfig, sizes: dict[str, tuple[int, int]], left: dict[str, str]
) -> None:
    found, out = possible_configs(given, (AUTO,), 9)
    assert {name: found[name].input_size for name in sizes} == sizes
    assert set(out) == set(left)
    for name, why in left.items():
        assert why in out[name]
        with pytest.raises(ConfigError, match=f"^--select {name} is not possible") as caught:
            possible_configs(given, ("as given", "fewer pixels", name), 9)
        assert why in caught.value.why
    if "lite" in found and given.backbone == preset("paper").backbone:
        assert found["lite"].layers == (4,)


def test_a_given_configuration_that_cannot_be_fitted_says_why() -> None:
    for config, message in (
        (make_config("fast", layers=(99,)), "no layer 99"),
        (make_config("fast", input_size=(230, 230)), "cannot take 230 x 230"),
        (make_config("vgg19", input_size=(230, 230)), "cannot take 230 x 230"),
        (make_config("vgg19", input_size=(240, 256)), "patches of 8 x 8"),
        (make_config("fast", input_size=(336, 336), saae_patch=5), "patches of 5 x 5"),
        (preset("paper").with_values({"score": "joint"}), "needs components"),
    ):
        with pytest.raises(ConfigError, match=message):
            possible_configs(config, (AUTO,), 9)
        assert possible_configs(config, (), 0) == ({}, {})
    # The images' shape decides the size, so none is wrong before they are known.
    check_geometry(preset("fast").replace(input_size=(230, 230)))


def test_a_build_says_what_it_leaves_out_and_refuses_before_the_first_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def stop(_: object, configs: dict[str, FitConfig], *__: object) -> None:
        tried.extend(configs)
        raise Enough

    monkeypatch.setattr(build_module, "try_configs", stop)
    data, console = draw(tmp_path / "data"), Console(file=io.StringIO(), width=160)
    with pytest.raises(Enough):
        build_module.build(options(data, tmp_path, select=(AUTO,)), console)
    assert tried == ["as given", "fewer pixels", "joint"]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "--select leaves out lite: The preset lite has no layers for vit_tiny_patch16_224." in text
    stages = build_module._STAGES + build_module._has_bf16(("fp32",)) + 2 * len(tried)
    assert f"1/{stages} find images" in text
    for changes, message in (
        ({"select": ("as given", "lite")}, "--select lite is not possible"),
        ({"select": (AUTO,), "self_test_frames": 0}, "--select needs at least one frame"),
    ):
        with pytest.raises(ConfigError, match=message):
            quiet_build(options(data, tmp_path, **changes))
    assert len(tried) == 3


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
