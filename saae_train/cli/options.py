"""Options of fitting and how they become a configuration, shared by `saae-train` and `saae-export`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from saae_runtime.errors import ConfigError

from ..config import SEEDS, FitConfig, few_layers, field_kind, preset

__all__ = [
    "MODELS",
    "Cache",
    "Data",
    "FitOptions",
    "Normal",
    "expand_options",
    "make_config",
    "parse_changes",
    "parse_layers",
    "parse_seeds",
    "parse_tiles",
    "parse_share",
    "parse_size",
]

_FIELDS = tuple(entry.name for entry in dataclasses.fields(FitConfig) if entry.name != "preset")
"""What `--set` takes."""

_OPTIONS = {"transformer": "--model", "precision": "--fit-precision"}
"""Fields whose option has another name."""

_SPELT = {"change": "--set", "texture": "--texture/--object"}
"""Fields of `FitOptions` whose option has another name."""

_image = functools.partial(typer.Option, rich_help_panel="Images")
_model = functools.partial(typer.Option, rich_help_panel="Model")
_fit = functools.partial(typer.Option, rich_help_panel="Fit")

Data = Annotated[Path | None, _image("--data", help="Folder of categories (MVTec AD layout).")]

Normal = Annotated[
    list[Path] | None,
    _image("--normal", metavar="FOLDER", help="Folder of images of good parts, in place of --data. May be repeated."),
]

Cache = Annotated[
    Path | None,
    typer.Option("--cache", rich_help_panel="Places", help="Cache of features. Default: $SAAE_CACHE or ~/.cache/saae."),
]

MODELS = ("saae", "cae")
"""Autoencoders by name: the SAAE, and the same without its transformer (the paper's Table 4, "w/o SAAE")."""


@dataclass(frozen=True)
class FitOptions:
    """The options of fitting, for `saae-train fit` and `saae-export build`. None: not given, so the preset's.

    The limits of the values are in `FitConfig`.
    """

    preset: Annotated[
        str,
        _model(
            "--preset",
            help="fast, lite and small (for slower processors), bank (no autoencoder, fitted soonest), paper "
            "(700 epochs), or the paper's cae, vgg19, dfr.",
        ),
    ] = "fast"
    model: Annotated[str | None, _model("--model", help="saae, or cae: without the transformer.")] = None
    backbone: Annotated[str | None, _model("--backbone", help="Name of a ViT in timm, or vgg19.")] = None
    weights: Annotated[
        str | None,
        _model("--weights", help="Of the backbone: a file, cache, hub or packaged. Default: the first one found."),
    ] = None
    layers: Annotated[
        str | None, _model("--layers", help="Of the backbone: 3-7 or 0,1,2,3,4. 0 is the patch projection.")
    ] = None
    input_size: Annotated[
        str | None,
        _model("--input-size", help="336, or HEIGHTxWIDTH as in 384x512. Default: the preset's, in the images' shape."),
    ] = None
    tiles: Annotated[
        str | None,
        _model(
            "--tiles",
            help="Windows of the input size that each image is seen through, e.g. 2x3, or auto: small defects on large "
            "images, for as many times the work.",
        ),
    ] = None
    components: Annotated[
        int | None, _model("--components", help="Principal components of the features that the model works in.")
    ] = None
    latent: Annotated[
        int | None, _model("--latent", help="Latent width V, a multiple of 3. Default: found by PCA.")
    ] = None
    saae_patch: Annotated[
        int | None,
        _model("--saae-patch", help="Patch size of the transformer, in grid positions. Default: 1; vgg19: 8."),
    ] = None
    texture: Annotated[
        bool | None,
        _model(
            "--texture/--object",
            help="MLP size V and pixel FPR 0, or 2V and 0.001. Default: by the category's name, or the checkpoint's.",
        ),
    ] = None
    loss: Annotated[str | None, _model("--loss", help="l2 (paper) or cosine.")] = None
    score: Annotated[
        str | None, _model("--score", help="l2 (paper), cosine, joint (needs --components) or memory.")
    ] = None
    smoothing: Annotated[
        float | None, _model("--smoothing", help="Sigma of the Gaussian filter over the score map, in patches.")
    ] = None
    steps: Annotated[int | None, _fit("--steps", help="Optimiser steps.")] = None
    epochs: Annotated[
        int | None, _fit("--epochs", help="Epochs of ceil(images / batch) steps, in place of --steps.")
    ] = None
    batch: Annotated[int | None, _fit("--batch", help="Images per step.")] = None
    learning_rate: Annotated[float | None, _fit("--learning-rate", help="Peak learning rate of Adam.")] = None
    fit_precision: Annotated[
        str | None, _fit("--fit-precision", help="Precision of fitting: auto, bf16, tf32 or fp32.")
    ] = None
    seed: Annotated[
        int | None, _fit("--seed", help="Of the initial weights, the image order and the held-out split.")
    ] = None
    white_level: Annotated[
        int | None, _fit("--white-level", help="White of 16-bit images, e.g. 4095 for a 12-bit camera. Default: 65535.")
    ] = None
    device: Annotated[str | None, _fit("--device", help="cpu, cuda or cuda:1. Default: a GPU if there is one.")] = None
    change: Annotated[
        list[str] | None,
        _fit(
            "--set",
            metavar="KEY=VALUE",
            help="Any other field of the configuration, e.g. clip=null or keep=0.9. May be repeated.",
        ),
    ] = None

    def given(self) -> list[str]:
        """The options that were given a value other than their default."""
        fields = [entry for entry in dataclasses.fields(self) if getattr(self, entry.name) not in (entry.default, [])]
        return [_SPELT.get(entry.name, f"--{entry.name.replace('_', '-')}") for entry in fields]

    def config(self) -> FitConfig:
        """The configuration that these options give. Raises ConfigError as `make_config` does."""
        return make_config(
            self.preset,
            self.model,
            fixed=parse_changes(self.change or ()),
            backbone=self.backbone,
            layers=parse_layers(self.layers),
            input_size=parse_size(self.input_size),
            tiles=parse_tiles(self.tiles),
            components=self.components,
            latent=self.latent,
            saae_patch=self.saae_patch,
            loss=self.loss,
            score=self.score,
            smoothing=self.smoothing,
            steps=self.steps,
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=self.learning_rate,
            precision=self.fit_precision,
            seed=self.seed,
            white_level=self.white_level,
        )


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a function that takes dataclasses of options, such as `FitOptions`, into a typer command.

    Typer knows only one parameter per option, so the fields of a dataclass take the place of its parameter, with
    their annotations and defaults.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not (isinstance(parameter.annotation, type) and dataclasses.is_dataclass(parameter.annotation)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group = parameter.annotation
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default, annotation=hints[entry.name]
            )
            for entry in dataclasses.fields(group)
        ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {
            name: group(**{entry.name: values.pop(entry.name) for entry in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`3,4,5` or `3-7` as layer indices. Raises ConfigError."""
    if text is None:
        return None
    try:
        found: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            piece = range(int(first), int(last or first) + 1)
            if not piece:
                raise ValueError
            found.extend(piece)
        return tuple(found)
    except ValueError:
        raise ConfigError(f"--layers {text} is not a list of layers.", "", "e.g. --layers 3-7 or 0,1,2,3,4") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`392` or `384x512` as (height, width). Raises ConfigError."""
    if text is None:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError
        return sides[0], sides[-1]
    except ValueError:
        raise ConfigError(
            f"--input-size {text} is not a size.", "", "--input-size 392 or 384x512 (height x width)"
        ) from None


def parse_changes(words: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as FitConfig fields; values are JSON (null: None), or else text.

    For the `fixed` of `make_config`, which checks the values.

    Raises:
        ConfigError: not KEY=VALUE, no such field (near names are suggested), or a field that is given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in _FIELDS:
            raise _no_field(word, key)
        if not equals:
            raise ConfigError(
                f"--set {word} is not possible.",
                f"It takes KEY=VALUE, and {key} is {field_kind(key)}.",
                f"--set {key}=VALUE",
            )
        if key in found:
            raise ConfigError(f"--set {key} is given more than once.", "", "give it once")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def _no_field(word: str, key: str) -> ConfigError:
    why = "It takes KEY=VALUE with a field of the fitting configuration."
    if key == "preset":
        return ConfigError(f"--set {word} is not possible.", "A preset sets many fields at once.", "--preset NAME")
    near = difflib.get_close_matches(key.strip().lower().replace("-", "_"), _FIELDS, n=3, cutoff=0.6)
    if not near:
        return ConfigError(f"--set {word} is not possible.", why, f"one of: {', '.join(_FIELDS)}")
    kinds = " or ".join(f"{name} ({field_kind(name)})" for name in near)
    return ConfigError(f"--set {word} is not possible.", why, f"did you mean {kinds}?")


def parse_share(text: str | None, option: str) -> float | None:
    """`5/1000`, `0.5%` or `0.005` as a share, 0..1. Raises ConfigError."""
    if text is None:
        return None
    try:
        if "/" in text:
            part, whole = text.split("/")
            share = float(part) / float(whole)
        elif text.strip().endswith("%"):
            share = float(text.strip()[:-1]) / 100.0
        else:
            share = float(text)
        if not 0.0 <= share <= 1.0:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option} {text} is not a share.", "", f"{option} 5/1000, 0.5% or 0.005") from None
    return share


def parse_tiles(text: str | None) -> tuple[int, int] | None:
    """`2x3` as rows and columns, `auto` as (0, 0); None for nothing. Raises ConfigError."""
    if text is None:
        return None
    if text == "auto":
        return 0, 0
    match = re.fullmatch(r"([1-9][0-9]?)x([1-9][0-9]?)", text)
    if match is None:
        raise ConfigError(
            f"--tiles {text} is not a number of tiles.", "", "--tiles 2x3 (rows x columns), or --tiles auto"
        )
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as seeds, without repeats, in order; none for an empty text. Raises ConfigError."""
    try:
        seeds = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
        if any(seed not in SEEDS for seed in seeds):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seeds {text} is not a list of seeds.", "", "e.g. --seeds 0,1,2") from None
    return seeds


def make_config(
    name: str, model: str | None = None, *, fixed: Mapping[str, Any] | None = None, **changes: Any
) -> FitConfig:
    """A preset with the options that were given (those that are not None), and with all of `fixed`.

    A backbone other than the preset's brings its own input size and layers unless they are given.

    Args:
        name: of the preset.
        model: `saae` or `cae`; None: the preset's.
        fixed: fields of `FitConfig` and their values, None among them, see `parse_changes`.
        changes: fields of `FitConfig`; None: not given.

    Raises:
        ConfigError: no such preset or model, options that exclude each other, or a value that a field cannot take.
    """
    if model is not None and model not in MODELS:
        raise ConfigError(f"There is no model {model!r}.", "", f"--model {' or --model '.join(MODELS)}")
    base = preset(name)
    if model is not None:
        changes["transformer"] = model == "saae"
    named = {key: value for key, value in changes.items() if value is not None}
    for key in fixed or {}:
        if key in named:
            option = _OPTIONS.get(key, f"--{key.replace('_', '-')}")
            raise ConfigError(
                f"{option} and --set {key} exclude each other.", "They set the same field.", "give one of them"
            )
    given = named | dict(fixed or {})
    if "input_size" in given:
        given.setdefault("follow_shape", False)
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ConfigError("--steps and --epochs exclude each other.", "", "give one of them")
    config = base.with_values(given)
    if "layers" not in given and base.layers is not None and _family(config.backbone) != _family(base.backbone):
        config = dataclasses.replace(config, layers=few_layers(config.preset, config.backbone))
    if "input_size" not in given and _family(config.backbone) != _family(base.backbone):
        from ..model.vit import choose_input_size  # needs torch and timm

        config = config.replace(input_size=choose_input_size(config.backbone))
    return config


def _family(backbone: str) -> str:
    return backbone.split(".", 1)[0]
