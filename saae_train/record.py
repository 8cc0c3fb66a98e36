"""The record of a fit: the part `facts` of a checkpoint's config.json as a frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitRecord"]


@dataclass(frozen=True)
class FitRecord:
    """How a model was fitted. Fields that an earlier version did not write are None or empty.

    Attributes:
        images: number of images fitted on.
        digest: content digest of all of them, in the order of the fit.
        fitted_on: sha256 of each of their files, sorted.
        held_out: names of the images that were held out, sorted.
        synthetic: whether the images were drawn.
        texture: whether the product was fitted as a texture (MLP size V) or an object (2V).
        device: torch device.
        precision: arithmetic: `bf16`, `tf32` or `fp32`.
        captured_steps: steps replayed from a CUDA graph.
        seconds_features: time for the features.
        seconds_fit: time for the steps, summed over resumed runs.
        loss: (step, mean loss per position) pairs.
        tools: versions of the libraries used.
    """

    images: int | None = None
    digest: str | None = None
    fitted_on: tuple[str, ...] | None = None
    held_out: tuple[str, ...] = ()
    synthetic: bool | None = None
    texture: bool | None = None
    device: str | None = None
    precision: str | None = None
    captured_steps: int = 0
    seconds_features: float | None = None
    seconds_fit: float | None = None
    loss: tuple[tuple[int, float], ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        """Whether it was fitted in bfloat16."""
        return self.precision == "bf16"

    def to_json(self) -> dict[str, Any]:
        """JSON values, without unknown fields."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        lists: dict[str, Any] = {"held_out": list(self.held_out), "loss": [list(pair) for pair in self.loss]}
        if self.fitted_on is not None:
            lists["fitted_on"] = list(self.fitted_on)
        return {**known, **lists, "tools": dict(self.tools), "bf16": self.bf16}

    @classmethod
    def from_json(cls, values: Any) -> FitRecord:
        """The inverse of `to_json`; keys of other versions are left out.

        Raises:
            ValueError: a value is not of its key's type; the message names the key.
        """
        if not isinstance(values, Mapping):
            raise ValueError("facts: expected an object")
        found = {}
        for item in dataclasses.fields(cls):
            value = values.get(item.name)
            if value is not None:
                found[item.name] = _decode(item.name, str(item.type).removesuffix(" | None"), value)
        return cls(**found)


def _decode(name: str, kind: str, value: Any) -> Any:
    """Convert a value of parsed JSON to the type of its field."""
    if kind == "float" and _is(value, int):
        return float(value)
    if kind in _PLAIN and _is(value, _PLAIN[kind]):
        return value
    if kind == "tuple[str, ...]" and _is(value, list) and all(_is(entry, str) for entry in value):
        return tuple(value)
    if kind == "tuple[tuple[int, float], ...]" and _is(value, list) and all(map(_is_pair, value)):
        return tuple((int(step), float(loss)) for step, loss in value)
    if kind == "Mapping[str, str]" and _is(value, dict) and all(_is(entry, str) for entry in value.values()):
        return value
    raise ValueError(f"facts.{name}: expected {kind}, found {str(value)[:60]!r}")


_PLAIN: Mapping[str, type] = {"int": int, "str": str, "bool": bool, "float": float}


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_pair(value: Any) -> bool:
    return _is(value, list) and len(value) == 2 and all(_is(part, int) or _is(part, float) for part in value)
