"""The promise of docs/versions.md: bundles of every earlier schema open, score as they did, and can be rewritten.

Each file in `bundles/` holds the folder that `make_tiny_bundle` (FP32 and FP16) wrote with the code of its time: names,
and the text of a JSON file, or base64 of any other. Whoever raises the schema number adds that of the new one.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import expected_map, gray_frame

from saae_runtime import Engine, open_bundle
from saae_runtime.bundle import update_bundle
from saae_runtime.manifest import SCHEMA

ARCHIVES = {int(re.sub(r"\D", "", path.stem)): path for path in (Path(__file__).parent / "bundles").glob("*.json")}
CPU = "onnxruntime:cpu"


def test_every_schema_has_a_bundle_of_its_time() -> None:
    assert sorted(ARCHIVES) == list(range(1, SCHEMA + 1))


@pytest.fixture(params=sorted(ARCHIVES))
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    """(schema number, folder of the unpacked bundle)"""
    (tmp_path / "bundle").mkdir()
    for name, content in json.loads(ARCHIVES[request.param].read_text()).items():
        data = content.encode() if name.endswith(".json") else base64.b64decode(content)
        (tmp_path / "bundle" / name).write_bytes(data)
    return request.param, tmp_path / "bundle"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_old_bundle_opens_and_scores(old: tuple[int, Path], precision: str) -> None:
    schema, folder = old
    assert json.loads((folder / "manifest.json").read_text())["schema"] == schema
    frame = gray_frame(spot=(10, 20, 8, 8))
    with Engine(folder, backend=CPU, precision=precision) as engine:  # hashes are compared, too
        assert engine.manifest.schema == schema
        assert engine.threshold == engine.image_threshold == 40.0
        found, clean = engine(frame), engine(gray_frame())
    np.testing.assert_allclose(found.anomaly_map, expected_map(frame), rtol=0, atol=0.2)
    assert found.is_anomalous
    assert found.mask.any()
    assert not clean.is_anomalous


def test_what_a_later_schema_added_has_the_value_of_before(old: tuple[int, Path]) -> None:
    manifest = open_bundle(old[1]).manifest
    assert manifest.frame.white_level is None
    assert manifest.calibration.given_later is manifest.calibration.left_out is False
    assert (manifest.calibration.near_copies, manifest.calibration.outliers) == (0, ())
    assert {table.pixel.rule for table in manifest.thresholds.values()} == {"quantile"}


def test_an_old_bundle_is_rewritten_in_the_present_schema(old: tuple[int, Path]) -> None:
    bundle = open_bundle(old[1])
    before = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    update_bundle(bundle, bundle.manifest, {"added.txt": b"x"})
    again = open_bundle(old[1]).manifest
    assert again.schema == SCHEMA
    assert {name: entry.sha256 for name, entry in again.files.items() if name in before} == before
    assert again.thresholds == bundle.manifest.thresholds
