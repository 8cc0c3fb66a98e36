"""How options of a command line become a fitting configuration: one grammar for `saae-train` and `saae-export`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from saae_runtime.errors import ConfigError

from ..config import LITE_LAYERS, FitConfig, preset

__all__ = ["MODELS", "make_config", "parse_changes", "parse_layers", "parse_seeds", "parse_size"]

MODELS = ("saae", "cae")
"""Autoencoders by name: the SAAE, and the same without its transformer (the paper's Table 4, "w/o SAAE")."""


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
    """`KEY=VALUE` words as FitConfig fields; values are JSON (null: None), or text where they are none.

    For the `fixed` of `make_config`, which says what a field cannot take.

    Raises:
        ConfigError: not KEY=VALUE, or no such field.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in FitConfig.__dataclass_fields__:
            raise ConfigError(
                f"--set {word} is not possible.",
                "It takes KEY=VALUE with a field of FitConfig.",
                f"one of: {', '.join(FitConfig.__dataclass_fields__)}",
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as seeds, each once, in their order; nothing gives none. Raises ConfigError."""
    try:
        seeds = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seeds {text} is not a list of seeds.", "", "e.g. --seeds 0,1,2") from None
    return seeds


def make_config(
    name: str, model: str | None = None, *, fixed: Mapping[str, Any] | None = None, **changes: Any
) -> FitConfig:
    """A preset with the options that were given (those that are not None), and with all of `fixed`.

    A backbone other than the preset's comes with its own input size and layers where none are given.

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
    given = {key: value for key, value in changes.items() if value is not None} | dict(fixed or {})
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ConfigError("--steps and --epochs exclude each other.", "", "give one of them")
    config = base.with_values(given)
    if "layers" not in given and base.layers is not None and _family(config.backbone) != _family(base.backbone):
        config = dataclasses.replace(config, layers=_one_layer(config))
    if "input_size" not in given and _family(config.backbone) != _family(base.backbone):
        from ..model.vit import choose_input_size  # needs torch and timm

        config = config.replace(input_size=choose_input_size(config.backbone))
    return config


def _one_layer(config: FitConfig) -> tuple[int, ...]:
    family = _family(config.backbone)
    if family not in LITE_LAYERS:
        raise ConfigError(
            f"The preset {config.preset} knows no single layer of {config.backbone}.",
            f"It has one for {', '.join(LITE_LAYERS)}.",
            "name it: --layers 4 (about a third of the way up)",
        )
    return (LITE_LAYERS[family],)


def _family(backbone: str) -> str:
    return backbone.split(".", 1)[0]
