"""The manifest: what is written is what is read, and nothing else is taken."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from tiny_bundle import tiny_manifest

from saae_runtime.errors import BundleCorruptError, BundleError, BundleVersionError
from saae_runtime.manifest import SCHEMA, Artefact, Calibration, FileEntry, Manifest, Parity, Profile


def whole_manifest() -> Manifest:
    parity = Parity(12, 1e-4, 2e-5, 0, 1e-3, 1e-3, True, "good/001.png", "PyTorch FP32")
    engine = Artefact(
        "tensorrt-10.3-sm87.engine",
        "engine",
        "fp16",
        library="tensorrt",
        library_version="10.3.0",
        sm="sm87",
        profile=Profile(1, 4, 8),
        options={"workspace": 1024},
        parity=parity,
    )
    manifest = tiny_manifest(precisions=("fp32", "fp16"))
    return dataclasses.replace(
        manifest,
        artefacts=(*manifest.artefacts, engine),
        metrics={"label": "synthetic", "pixel_roc_auc": 0.98},
        files={engine.file: FileEntry("a" * 64, 10)},
    )


def test_round_trip_through_json() -> None:
    manifest = whole_manifest()
    data = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    assert Manifest.from_json(data) == manifest
    assert next(iter(data)) == "schema"


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_manifest().category = "other"  # type: ignore[misc]


def edited(path: str, value: object) -> dict:
    data = copy.deepcopy(whole_manifest().to_json())
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("category", 5, "category: expected a string"),
        ("synthetic", 1, "synthetic: expected true or false"),
        ("frame.height", "64", "frame.height: expected a whole number"),
        ("frame.height", True, "frame.height: expected a whole number"),
        ("frame.height", 0, "frame: height: expected 1 or more"),
        ("frame.depth", 3, "frame.depth: unknown key"),
        ("surprise", 3, "surprise: unknown key"),
        ("calibration.held_out", "yes", "calibration.held_out: expected true or false"),
        ("calibration.given_later", None, "calibration.given_later: expected true or false"),
        ("model.grid", [1], "grid"),
        ("model.layers", 3, "model.layers: expected a list"),
        ("artefacts.0.precision", "fp8", "artefacts[0]: precision"),
        ("artefacts.0.kind", "pickle", "artefacts[0]: kind"),
        ("artefacts.2.library", None, "artefacts[2]: library"),
        ("artefacts.2.profile.max", 2, "artefacts[2].profile"),
        ("artefacts.2.parity.images", 1.5, "artefacts[2].parity.images"),
        ("thresholds.fp8", {}, "thresholds.fp8.pixel: missing"),
        ("thresholds.fp32.pixel.threshold.1", float("nan"), "thresholds.fp32.pixel.threshold[1]: expected a finite"),
        ("thresholds.fp32.pixel.threshold.1", 1e9, "thresholds must not rise"),
        ("thresholds.fp32.image.fpr.0", 0.1, "rates must start at 0"),
        ("thresholds.fp32.image.count", 0, "no samples"),
        ("metrics.pixel_roc_auc", float("inf"), "metrics.pixel_roc_auc: expected a finite"),
        ("files", {"a": {"sha256": "xyz", "size": 1}}, "files.a: sha256"),
        ("files", {"a": {"sha256": "a" * 64, "size": -1}}, "files.a: size"),
        ("files", [], "files: expected an object"),
        ("thresholds.fp32.pixel.default_fpr", 10**400, "thresholds.fp32.pixel.default_fpr: expected a number"),
        ("thresholds.fp32.pixel.count", 10**400, "thresholds.fp32.pixel.count: expected a number of at most 64 bits"),
        ("frame.height", 1 << 63, "frame.height: expected a number of at most 64 bits"),
        ("metrics.pixel_roc_auc", 10**4000, "metrics.pixel_roc_auc: expected a number of at most 64 bits"),
        ("metrics.deep", {"x": [1, "\ud800"]}, "metrics.deep.x[1]: expected text"),
        ("category", "\ud800", "category: expected text that can be written as UTF-8"),
        ("files", {"\udcff.onnx": {"sha256": "a" * 64, "size": 1}}, "files: expected text"),
        ("\ud800", 1, "unknown key"),
    ],
)
def test_each_wrong_key_is_named(path: str, value: object, named: str) -> None:
    with pytest.raises(BundleCorruptError) as caught:
        Manifest.from_json(edited(path, value))
    assert named in caught.value.why
    assert caught.value.cure


@pytest.mark.parametrize("key", ["category", "frame", "thresholds", "artefacts", "calibration"])
def test_missing_key(key: str) -> None:
    data = whole_manifest().to_json()
    del data[key]
    with pytest.raises(BundleCorruptError, match=f"{key}: missing"):
        Manifest.from_json(data)


@pytest.mark.parametrize("data", [[], None, "text", {"name": "another program's file"}, {"schema": "1"}, {"schema": 0}])
def test_foreign_json(data: object) -> None:
    with pytest.raises(BundleCorruptError):
        Manifest.from_json(data)


def test_newer_schema_comes_before_unknown_keys() -> None:
    data = {"schema": SCHEMA + 1, "saae_version": "9.0", "entirely": "different"}
    with pytest.raises(BundleVersionError, match=r"9\.0") as caught:
        Manifest.from_json(data)
    assert "upgrade" in caught.value.cure


def test_whole_numbers_are_fine_where_floats_are_expected() -> None:
    manifest = Manifest.from_json(edited("thresholds.fp32.pixel.threshold.0", 1000))
    assert manifest.thresholds["fp32"].pixel.at(0.0) == 1000.0


def test_white_level_is_optional_and_bounded() -> None:
    old = edited("schema", 3)
    old["frame"].pop("white_level", None)
    assert Manifest.from_json(old).frame.white_level is None
    assert Manifest.from_json(edited("frame.white_level", 4095)).frame.white_level == 4095
    for wrong in (0, 254, 65536, 4095.5, "4095"):
        with pytest.raises(BundleCorruptError, match="white_level"):
            Manifest.from_json(edited("frame.white_level", wrong))


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_a_calibration_of_every_schema_is_read(schema: int) -> None:
    data = edited("schema", schema)
    if schema < 3:
        del data["calibration"]["given_later"]
    assert Manifest.from_json(data).calibration == Calibration(10, "0" * 64, True, given_later=False)
    if schema >= 3:
        data["calibration"].update(held_out=None, given_later=True)
        assert Manifest.from_json(data).calibration == Calibration(10, "0" * 64, None, given_later=True)


@pytest.mark.parametrize("schema", [10**400, 10**5000, -(10**5000)], ids=["400", "5000", "-5000"])
def test_a_schema_of_any_length_has_its_error(schema: int) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json({**whole_manifest().to_json(), "schema": schema})
    assert len(caught.value.what) < 300


@pytest.mark.parametrize("levels", [60, 700, 5000])
def test_a_manifest_nested_without_end_is_a_damaged_one(levels: int) -> None:
    nested: list[object] = []
    for _ in range(levels):
        nested = [nested]
    with pytest.raises(BundleCorruptError):
        Manifest.from_json(edited("metrics.x", nested))
