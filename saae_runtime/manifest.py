"""The manifest of a bundle: manifest.json as frozen dataclasses, parsed strictly."""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from .errors import BundleCorruptError, BundleVersionError, CalibrationError, shown
from .thresholds import ThresholdTable

__all__ = [
    "IN_BF16",
    "KINDS",
    "PRECISIONS",
    "SCHEMA",
    "Artefact",
    "Backbone",
    "Calibration",
    "FileEntry",
    "Frame",
    "Manifest",
    "Model",
    "Parity",
    "Profile",
    "Thresholds",
    "rebuild_command",
    "split_sms",
]

SCHEMA = 4
"""Version of the manifest's format. A reader accepts all lower ones and refuses higher ones.
2: `bf16` and `int8-bf16`. 3: `calibration.given_later`, and `calibration.held_out` may be null.
4: `frame.white_level`; `calibration.left_out`, `near_copies` and `outliers`; `rule` of a threshold table."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-bf16")
"""Precisions of an artefact, each with its own thresholds. `bf16` is the FP32 graph computed in bf16, and `int8-bf16`
the INT8 graph with the rest in bf16; only OpenVINO computes these two."""

IN_BF16 = ("bf16", "int8-bf16")
"""The precisions that need OpenVINO and a processor with bf16."""

KINDS = ("onnx", "engine")


@dataclass(frozen=True)
class Frame:
    """Geometry of the graph's input `frame`.

    Attributes:
        height, width: in pixels.
        baked: whether this is the camera's frame size and the graph contains the resize.
        white_level: white level of 16-bit images and frames that the model was fitted with. None: 65535 for images,
            and no 16-bit frames.
    """

    height: int
    width: int
    baked: bool = False
    white_level: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "height", "width")
        if self.white_level is not None and not 255 <= self.white_level <= 65535:
            raise ValueError(f"white_level: expected 255 to 65535, found {self.white_level}")


@dataclass(frozen=True)
class Model:
    """The model inside the graph: input size and patch P in pixels, grid (h, w) in patches, latent width V."""

    height: int
    width: int
    patch: int
    grid: tuple[int, ...]
    latent_dim: int
    layers: tuple[int, ...]
    components: int | None
    loss: str
    score: str
    preset: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(self, "height", "width", "patch", "latent_dim")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError("grid: expected two positive numbers [h, w]")

    @property
    def autoencoder(self) -> str:
        """Description of the autoencoder: SAAE, CAE (the SAAE without its transformer) or none."""
        if self.config.get("steps") == 0:
            return "none, the memory alone"
        if self.config.get("transformer") is False:
            return "CAE, no transformer"
        patch = self.config.get("saae_patch") or 1
        return "SAAE" if patch == 1 else f"SAAE, patches of {patch} x {patch}"


@dataclass(frozen=True)
class Backbone:
    """The frozen feature extractor and the exact weights that were used."""

    name: str
    weights_source: str
    weights_sha256: str


@dataclass(frozen=True)
class Thresholds:
    """Pixel and image thresholds at one precision."""

    pixel: ThresholdTable
    image: ThresholdTable


@dataclass(frozen=True)
class Calibration:
    """Origin of the thresholds.

    Attributes:
        images: number of normal images.
        digest: their content digest.
        held_out: whether the model was not fitted on them; None: unknown.
        left_out: whether the model was fitted on them, and each was scored with itself left out of the memory.
        near_copies: images this near in the order of the names are near-copies and were left out with it; 0: none.
        outliers: names of images that look unlike the others, or that alone change the image threshold.
        given_later: whether `saae-export calibrate` used them for the finished bundle.
    """

    images: int
    digest: str
    held_out: bool | None
    given_later: bool = False
    left_out: bool = False
    near_copies: int = 0
    outliers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Batch sizes that a compiled engine takes."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError("expected 1 <= min <= opt <= max")


@dataclass(frozen=True)
class Parity:
    """Agreement of one artefact with its reference.

    Attributes:
        images: number of real images.
        map_rel_error, score_rel_error: largest relative errors.
        flips: images whose decision at T differs.
        bound_map, bound_score: bounds of these errors.
        passed: whether all bounds hold.
        worst_image: image of the largest error.
        reference: what it was compared with.
    """

    images: int
    map_rel_error: float
    score_rel_error: float
    flips: int
    bound_map: float
    bound_score: float
    passed: bool
    worst_image: str
    reference: str


@dataclass(frozen=True)
class Artefact:
    """One deployable file: an ONNX graph, or an engine compiled by `library` for one GPU generation `sm`."""

    file: str
    kind: str
    precision: str
    library: str | None = None
    library_version: str | None = None
    sm: str | None = None
    profile: Profile | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parity: Parity | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.kind == "engine" and self.library is None:
            raise ValueError("library: an engine needs the name of the library that compiled it")


@dataclass(frozen=True)
class FileEntry:
    """sha256 (hex) and size in bytes of one file of the bundle."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError("sha256: expected 64 lower-case hex digits")
        if self.size < 0:
            raise ValueError("size: expected 0 or more")


@dataclass(frozen=True)
class Manifest:
    """A whole bundle; `files` lists every file except manifest.json and is filled in when the bundle is written."""

    saae_version: str
    created: str
    category: str
    synthetic: bool
    frame: Frame
    model: Model
    backbone: Backbone
    thresholds: Mapping[str, Thresholds]
    calibration: Calibration
    artefacts: tuple[Artefact, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        unknown = sorted(set(self.thresholds) - set(PRECISIONS))
        if unknown:
            raise ValueError(f"thresholds: unknown precision {unknown[0]!r}")

    @classmethod
    def from_json(cls, data: Any, source: str = "manifest.json") -> Manifest:
        """Read a parsed manifest; every key must be known, present where it has no default, and of its type.

        Args:
            data: parsed JSON.
            source: the file's name, for messages.

        Raises:
            BundleVersionError: written by a newer saae.
            BundleCorruptError: not a manifest, or a key that is missing, unknown, of a wrong type or out of range.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise BundleCorruptError(
                f"{source} is not a saae manifest.",
                "It has no key `schema`.",
                "give the folder that `saae-export build` wrote",
            )
        schema = data["schema"]
        if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
            raise BundleCorruptError(f"{source}: schema is {shown(schema)}.", "Expected a whole number.", _REBUILD)
        if schema > SCHEMA:
            raise BundleVersionError(
                f"{source} has schema {shown(schema)}; this saae reads up to {SCHEMA}.",
                f"The bundle was written by a newer saae ({shown(data.get('saae_version', 'version unknown'))}).",
                "pip install --upgrade saae, or rebuild the bundle with this version: saae-export build",
            )
        try:
            manifest: Manifest = _decode(cls, data, "")
        except (ValueError, RecursionError) as error:
            raise BundleCorruptError(f"{source} is damaged or was edited by hand.", str(error), _REBUILD) from error
        return manifest

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the inverse of `from_json`."""
        encoded: dict[str, Any] = {"schema": self.schema}
        encoded.update(_encode(self))
        return encoded

    def precisions(self) -> tuple[str, ...]:
        """Precisions that the bundle has an artefact for, in the order of the manifest, without repeats."""
        return tuple(dict.fromkeys(artefact.precision for artefact in self.artefacts))


def rebuild_command(library: str, sm: str | None, precision: str, bundle: str = "BUNDLE") -> str:
    """The command that builds an engine for a library and GPU; `tensorrt` builds only on the target GPU."""
    target = f" --for {','.join(split_sms(sm))}" if sm else ""
    named = f"{shlex.quote(bundle)} --library {library.replace('_', '-')}"
    return f"saae-export engine {named}{target} --precision {precision}"


def split_sms(sm: str | None) -> tuple[str, ...]:
    """The GPU generations of an engine: `sm89` is one, `sm86+sm89+sm120` is three, None is none."""
    return tuple(part for part in (sm or "").split("+") if part)


_LARGEST = (1 << 63) - 1
_DEEPEST = 50  # levels; far below Python's recursion limit

_REBUILD = "copy the bundle again, or rebuild it: saae-export build"


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, found {shown(getattr(owner, name))}")


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Convert parsed JSON to `kind` (a type or a type hint); ValueError names the key that does not fit."""
    if kind is Any:
        _check_plain(value, where)
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, "an object", value)
        for key in value:
            _check_plain(key, where)
        return {str(key): _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(where, _NAMES[kind], value)
    _check_plain(value, where)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where or "the manifest", "an object", value)
    prefix = f"{where}." if where else ""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"{prefix}{shown(name)[1:-1]}: unknown key")
    hints = _hints(kind)
    arguments = {}
    for name, item in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], prefix + name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name}: missing")
    try:
        return kind(**arguments)
    except (ValueError, CalibrationError) as error:
        found = error.what if isinstance(error, CalibrationError) else str(error)
        raise ValueError(f"{where}: {found}" if where else found) from error


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Refuse numbers that are not finite or of more than 64 bits, text that no terminal can hold, and deep nesting."""
    if depth > _DEEPEST:
        raise ValueError(f"{where[:60]}: nested more than {_DEEPEST} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, "a finite number", value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise _wrong(where, "a number of at most 64 bits", value)
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _wrong(where, "text that can be written as UTF-8", value) from None
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]", depth + 1)


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _wrong(where: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"{where or 'the manifest'}: expected {expected}, found {shown(found)}")
