"""Presets and the configuration: the paper's numbers as published, and values that cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from saae_runtime.errors import ConfigError
from saae_train.config import FEW_LAYERS, PAPER_BACKBONE, PRESETS, TEXTURES, FitConfig, default_layers, preset
from saae_train.model.vgg import VGGFeatures
from saae_train.model.vit import ViTFeatures
from saae_train.model.weights import PACKAGED_NAME

PAPER: dict[str, tuple[Any, str]] = {
    "backbone": ("vit_base_patch16_384", "4.1.2: ViT-B/16"),
    "input_size": ((384, 384), "4.1.2: images resized to 384 x 384"),
    "layers": (None, "4.1.2: the backbone's own, checked below"),
    "standardise": (False, "3.1, eq. (1): f as it is"),
    "follow_shape": (False, "4.1.2: images resized to 384 x 384, whatever their shape"),
    "tiles": (None, "4.1.2: images resized whole"),
    "memory": (None, "section 3: the autoencoder alone"),
    "components": (None, "Table 1: the first convolution takes all U channels"),
    "component_power": (0.0, "3.1: not scaled"),
    "keep": (0.8, "4.1.2: PCA retains 80 %"),
    "latent": (None, "4.1.2: V from PCA"),
    "latent_limit": (None, "4.1.2: no limit is named"),
    "mlp_ratio": (None, "4.1.2: V for textures, 2V for objects: by category"),
    "transformer": (True, "3.2"),
    "saae_patch": (None, "4.1.2: 1, and 8 with VGG19 (4.3): the backbone's own, checked below"),
    "loss": ("l2", "eq. (2)"),
    "score": ("l2", "eq. (3)"),
    "smoothing": (0.0, "3.3: upsampled, not smoothed"),
    "steps": (None, "4.1.2: epochs are named"),
    "epochs": (700, "4.1.2"),
    "batch": (32, "4.1.2"),
    "learning_rate": (1e-4, "4.1.2"),
    "warmup": (0, "4.1.2: Adam at 1e-4, no schedule named"),
    "cosine_decay": (False, "4.1.2: no schedule named"),
    "clip": (None, "4.1.2: none named"),
    "precision": ("tf32", "4.1.2: a GTX 1080 Ti has FP32; what a newer GPU rounds is the products' factors"),
}
"""Every number of the `paper` preset, with the section of the paper that it is from."""

FREE = {"preset", "seed", "held_out", "white_level"}
"""What the paper does not say: its seed, its camera, and how the threshold's normal images are kept separate."""


def test_paper_preset_is_the_papers() -> None:
    config = preset("paper")
    assert {name: getattr(config, name) for name in PAPER} == {name: value for name, (value, _) in PAPER.items()}
    # A field added later must be looked up in the paper, too.
    assert set(PAPER) | FREE == {field.name for field in dataclasses.fields(FitConfig)}
    # z0..z4: the projection and the first four blocks (4.1.2), U = 3840.
    assert default_layers(PAPER_BACKBONE, 12) == ((0, 1, 2, 3, 4), True)
    assert default_layers(f"{PAPER_BACKBONE}.augreg_in21k_ft_in1k", 12) == ((0, 1, 2, 3, 4), True)


def test_the_papers_ablations_change_what_they_name_and_nothing_else() -> None:
    paper = preset("paper").to_json()
    vgg = {"backbone": "vgg19", "input_size": [256, 256]}  # 4.3
    for name, changed in (
        ("cae", {"transformer": False}),
        ("vgg19", vgg),
        ("dfr", {**vgg, "transformer": False}),
    ):
        assert preset(name).to_json() == {**paper, **changed, "preset": name}
    assert default_layers("vgg19", 16) == (tuple(range(1, 13)), True)  # f1:12
    assert (ViTFeatures.saae_patch, VGGFeatures.saae_patch) == (1, 8)


def test_the_lighter_presets_are_the_default_on_fewer_blocks_and_pixels() -> None:
    fast, lite, small = preset("fast"), preset("lite"), preset("small")
    for light in (lite, small):
        assert light.layers == FEW_LAYERS[light.preset][PACKAGED_NAME]
        assert dataclasses.replace(light, preset="fast", layers=None, input_size=(336, 336)) == fast
    assert FEW_LAYERS["lite"][PAPER_BACKBONE] == (4,)  # 4.4.1
    # Blocks that are computed and positions: each is lighter than the one before.
    blocks = [max(default_layers(PACKAGED_NAME, 12)[0]), max(lite.layers), max(small.layers)]
    pixels = [config.input_size[0] for config in (fast, lite, small)]
    assert blocks == sorted(set(blocks), reverse=True)
    assert pixels == sorted(set(pixels), reverse=True)


def test_textures_are_the_papers_five_and_ours() -> None:
    assert {"carpet", "grid", "leather", "tile", "wood"} <= TEXTURES
    objects = {"bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor"}
    assert not TEXTURES & (objects | {"zipper"})


def test_fast_is_the_default_and_needs_no_network() -> None:
    assert preset("fast") == FitConfig()
    assert preset("fast").backbone == PACKAGED_NAME
    height, width = preset("fast").input_size
    assert height % 14 == width % 14 == 0
    layers, measured = default_layers(PACKAGED_NAME, 12)
    assert measured
    assert max(layers) <= 8  # the later blocks of the packaged weights are not for this task


def test_presets_know_their_names() -> None:
    assert all(config.preset == name for name, config in PRESETS.items())
    with pytest.raises(ConfigError, match="no preset 'slow'") as caught:
        preset("slow")
    assert "fast" in caught.value.cure
    assert "paper" in caught.value.cure


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12, 24, 40])
def test_layers_of_an_unknown_backbone(depth: int) -> None:
    layers, measured = default_layers("vit_unknown", depth)
    assert not measured
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] <= depth
    if depth >= 6:  # the middle third
        assert layers[0] == depth // 3
        assert layers[-1] == 2 * depth // 3


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = dataclasses.replace(PRESETS[name], layers=(1, 2))
    assert FitConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_of_another_version() -> None:
    values = FitConfig().to_json()
    for changed in ({**values, "new_thing": 1}, {key: value for key, value in values.items() if key != "loss"}):
        with pytest.raises(ConfigError, match=r"Not a fitting configuration: (new_thing|loss)"):
            FitConfig.from_json(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"keep": 0.0},
        {"input_size": (0, 10)},
        {"steps": None},
        {"epochs": 3},
        {"precision": "fp8"},
    ],
)
def test_what_cannot_work(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(FitConfig(), **changes)


def test_replace_ignores_what_was_not_given() -> None:
    config = FitConfig()
    assert config.replace(batch=None, seed=None) == config
    assert config.replace(batch=3, components=None).batch == 3


def test_steps_and_epochs_take_each_others_place() -> None:
    shorter = preset("paper").replace(steps=10)
    assert (shorter.steps, shorter.epochs) == (10, None)
    longer = preset("fast").replace(epochs=3)
    assert (longer.steps, longer.epochs) == (None, 3)
    with pytest.raises(ConfigError):
        preset("fast").replace(steps=1, epochs=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", "abc"),
        ("batch", True),
        ("batch", 1.5),
        ("input_size", 392),
        ("input_size", (392,)),
        ("layers", "3-7"),
        ("layers", (3, "4")),
        ("layers", ()),
        ("held_out", 2),
        ("keep", 5),
        ("steps", -1),
        ("tiles", (0, 2)),
        ("tiles", (2, 3, 1)),
        ("seed", "x"),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", 10**20 - 1),
        ("seed", None),
        ("transformer", 1),
        ("smoothing", -0.5),
        ("clip", math.nan),
        ("backbone", 3),
    ],
)
def test_a_field_takes_its_own_kind_of_value_and_says_so(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} cannot be") as caught:
        dataclasses.replace(FitConfig(), **{field: value})  # type: ignore[arg-type]
    assert caught.value.why
    with pytest.raises(ConfigError):
        FitConfig.from_json({**FitConfig().to_json(), field: value})


def test_whole_numbers_are_numbers() -> None:
    """As JSON written elsewhere has them."""
    values = FitConfig().to_json() | {"clip": 1, "smoothing": 0, "keep": 1, "latent": None}
    assert FitConfig.from_json(values).clip == 1
