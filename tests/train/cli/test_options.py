"""Options as both commands read them, and what a backbone brings along when nothing is given."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saae_runtime.errors import CheckpointError, ConfigError
from saae_train.cli.command import app
from saae_train.cli.options import (
    FitOptions,
    make_config,
    parse_changes,
    parse_layers,
    parse_seeds,
    parse_share,
    parse_size,
)
from saae_train.config import FEW_LAYERS, PRESETS, FitConfig, field_kind
from saae_train.data.demo import write_demo
from saae_train.model import vit as backbone_module
from saae_train.model.checkpoint import load_checkpoint
from saae_train.model.vit import build_backbone, choose_input_size


@pytest.mark.parametrize("text", ["", "a", "7-4", "-1", "1,,2", "1-2-3"])
def test_what_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(ConfigError, match="not a list of layers"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["", "wide", "0", "0x392", "-14", "1x2x3", "392.5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_own_backbone_keeps_the_presets_size(name: str) -> None:
    own = PRESETS[name]
    assert make_config(name) == own
    assert make_config(name, backbone=own.backbone).input_size == own.input_size
    if name not in FEW_LAYERS:  # which are smaller on purpose
        assert choose_input_size(own.backbone) == own.input_size


def test_another_backbone_brings_its_own_size() -> None:
    """Whichever preset it starts from; `--backbone vit_base_patch16_384` was refused, 16 not dividing 392."""
    assert make_config("fast", backbone="vit_base_patch16_384").input_size == (384, 384)
    for name in PRESETS:
        config = make_config(name, backbone="vit_tiny_patch16_224", layers=(1, 2))
        assert config.input_size == (224, 224)
        assert build_backbone(config.backbone, (1, 2), config.input_size, "random").grid == (14, 14)
    assert make_config("fast", backbone="vit_tiny_patch16_224", input_size=(64, 96)).input_size == (64, 96)
    # The tag names other weights of the same network.
    assert make_config("fast", backbone="vit_small_patch14_dinov2.lvd142m").input_size == (336, 336)


def test_lite_takes_the_layer_of_the_backbone_it_is_given() -> None:
    assert make_config("lite").layers == FEW_LAYERS["lite"]["vit_small_patch14_dinov2"]
    assert make_config("lite", backbone="vit_small_patch14_dinov2.lvd142m").layers == make_config("lite").layers
    config = make_config("lite", backbone="vit_base_patch16_384.augreg_in21k_ft_in1k")
    assert (config.layers, config.input_size) == ((4,), (384, 384))
    assert make_config("lite", backbone="vit_tiny_patch16_224", layers=(3,)).layers == (3,)
    for other in ("vit_tiny_patch16_224", "vgg19"):
        with pytest.raises(ConfigError, match=f"no layers for {other}") as caught:
            make_config("lite", backbone=other)
        assert "--layers" in caught.value.cure


def test_the_autoencoder_by_name() -> None:
    assert make_config("fast", "cae") == make_config("fast", transformer=False)
    assert make_config("dfr", "saae").transformer is True
    assert make_config("dfr").transformer is False
    assert make_config("fast", saae_patch=2).saae_patch == 2
    with pytest.raises(ConfigError, match="no model 'vae'"):
        make_config("fast", "vae")


def test_a_size_that_the_patch_does_not_divide_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "_shape", lambda name: (27, 14, (384, 250)))
    assert choose_input_size("some_vit") == (378, 252)


def test_an_unknown_backbone_is_named_where_it_is_built() -> None:
    config = make_config("fast", backbone="vit_of_nowhere")
    with pytest.raises(ConfigError, match="no model named vit_of_nowhere"):
        build_backbone(config.backbone, (1,), config.input_size, "random")


def test_the_line_that_a_missing_checkpoint_says_to_type_works(tmp_path: Path) -> None:
    write_demo(tmp_path / "data", "zipper", size=(64, 64), train=8, test_good=1, per_defect=1)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "fitted")
    normal = tmp_path / "data" / "zipper" / "train" / "good"
    program, *arguments = shlex.split(caught.value.cure.replace("FOLDER_OF_GOOD_PICTURES", str(normal)))
    assert program == "saae-train"
    # Nothing but what makes it small is added.
    small = ["--backbone", "vit_tiny_patch16_224", "--weights", "random", "--input-size", "64", "--layers", "1-2"]
    small += ["--steps", "2", "--batch", "4", "--latent", "12", "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, [*arguments, *small])
    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "fitted").config.steps == 2


def test_the_precision_of_fitting_has_one_name_and_an_older_one(tmp_path: Path) -> None:
    for option in ("--fit-precision", "--precision"):
        done = CliRunner().invoke(app, ["fit", "--normal", str(tmp_path), option, "int3"])
        assert done.exit_code == 2
        assert "no precision 'int3' for fitting" in " ".join(done.output.replace("│", " ").split())


def test_changes_are_fields_with_json_values() -> None:
    assert parse_changes(["steps=30", "layers=[3,4]", "score=l2", "transformer=false"]) == {
        "steps": 30,
        "layers": (3, 4),
        "score": "l2",
        "transformer": False,
    }
    with pytest.raises(ConfigError, match="nonsense") as found:
        parse_changes(["nonsense=1"])
    assert "latent" in found.value.cure


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("steps", "--set steps=VALUE"),
        ("learning-rate=1", "did you mean learning_rate (a number, more than 0)?"),
        ("Keep=1", "did you mean keep (a number, more than 0 and at most 1)?"),
        ("laters=[1]", "layers (a list of whole numbers, e.g. [3,4,5], 0 or more, or null)"),
        ("preset=paper", "--preset NAME"),
    ],
)
def test_what_is_no_change_says_what_would_be_one(word: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {re.escape(word)} is not possible") as found:
        parse_changes([word])
    assert cure in found.value.cure


def test_a_field_is_set_once() -> None:
    with pytest.raises(ConfigError, match="--set steps is given more than once"):
        parse_changes(["steps=3", "batch=2", "steps=4"])
    for changes, option in (
        ({"steps": 3}, "--steps"),
        ({"learning_rate": 0.1}, "--learning-rate"),
        ({"precision": "fp32"}, "--fit-precision"),
        ({"model": "cae"}, "--model"),
    ):
        key = {"model": "transformer"}.get(next(iter(changes)), next(iter(changes)))
        fixed = {key: FitConfig().to_json()[key]}
        with pytest.raises(ConfigError, match=f"{option} and --set {key} exclude each other"):
            make_config("fast", fixed=fixed, **changes)


def test_every_field_is_an_option_or_can_be_set() -> None:
    for name, value in FitConfig().to_json().items():
        if name != "preset":
            assert name in parse_changes([f"{name}={json.dumps(value)}"])
            assert field_kind(name)
    assert FitOptions().config() == FitConfig()
    assert FitOptions(model="cae", steps=3, change=["clip=null"]).config() == make_config(
        "fast", "cae", steps=3, fixed={"clip": None}
    )


@pytest.mark.parametrize(("text", "tiles"), [(None, None), ("2x3", (2, 3)), ("1x12", (1, 12)), ("auto", (0, 0))])
def test_tiles_by_rows_and_columns(text: str | None, tiles: tuple[int, int] | None) -> None:
    assert FitOptions(tiles=text).config().tiles == tiles


@pytest.mark.parametrize("text", ["2", "0x2", "2x", "-1x2", "2x3x4", "many"])
def test_what_is_no_number_of_tiles(text: str) -> None:
    with pytest.raises(ConfigError, match="no") as caught:
        FitOptions(tiles=text).config()
    assert "--tiles 2x3" in caught.value.cure


def test_null_is_a_value_that_is_set() -> None:
    fixed = parse_changes(["components=null", "latent_limit=null", "score=l2"])
    assert fixed == {"components": None, "latent_limit": None, "score": "l2"}
    config = make_config("fast", fixed=fixed)
    assert (config.components, config.latent_limit, config.score) == (None, None, "l2")
    assert make_config("fast", components=None).components == 320  # an option that was not given
    assert make_config("lite", fixed={"layers": None}).layers is None
    assert make_config("paper", fixed=parse_changes(["steps=7"])).epochs is None
    assert make_config("fast", fixed=parse_changes(["steps=null", "epochs=7"])).epochs == 7
    for words in (["steps=null"], ["steps=7", "epochs=7"], ["batch=null"], ["input_size=392"], ["layers=3-7"]):
        with pytest.raises(ConfigError):
            make_config("fast", fixed=parse_changes(words))


def test_seeds_are_whole_numbers_each_once() -> None:
    assert parse_seeds("2,0,2,1") == (2, 0, 1)
    assert parse_seeds("") == ()
    for text in ("a", "0,-1", "1.5", f"0,{2**31}"):
        with pytest.raises(ConfigError, match="not a list of seeds"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "share"), [("5/1000", 0.005), ("0.5%", 0.005), ("0.005", 0.005), ("0", 0.0), (None, None)]
)
def test_a_share_in_three_ways(text: str | None, share: float | None) -> None:
    assert parse_share(text, "--false-alarms") == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize("text", ["5/0", "1/2/3", "-1%", "101%", "x", "nan", ""])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a share") as caught:
        parse_share(text, "--false-alarms")
    assert "5/1000" in caught.value.cure
