"""Run-length encoding as pycocotools has it, both ways."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from saae_runtime.regions import find_regions
from saae_runtime.result import Result
from saae_runtime.rle import coco_rle


def check(mask: np.ndarray) -> None:
    found = coco_rle(mask)
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert found == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    np.testing.assert_array_equal(coco.decode(json.loads(json.dumps(found))), mask)


@settings(deadline=None)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_any_mask(mask: np.ndarray) -> None:
    check(mask)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1500), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_long_runs_and_large_differences(height: int, width: int, share: float, seed: int) -> None:
    mask = np.zeros((height, width), np.bool_)
    rng = np.random.default_rng(seed)
    for _ in range(int(6 * share)):
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + rng.integers(1, height + 1), left : left + 3] ^= True
    check(mask)


def test_clean_and_wholly_defective_frames() -> None:
    for value in (False, True):
        check(np.full((300, 7), value))


def test_the_regions_of_a_result() -> None:
    anomaly_map = np.zeros((40, 60), np.float32)
    anomaly_map[5:9, 10:20] = 3
    anomaly_map[30, 50] = 2
    result = Result(3.0, anomaly_map, anomaly_map > 1, 1.0, 1.5)
    first, second = result.coco()
    assert (first["bbox"], first["area"], first["score"]) == ([10, 5, 10, 4], 40, 3.0)
    assert (second["bbox"], second["area"]) == ([50, 30, 1, 1], 1)
    np.testing.assert_array_equal(coco.decode(first["segmentation"]), anomaly_map == 3)
    assert coco.area(second["segmentation"]) == 1
    assert list(coco.toBbox(first["segmentation"])) == first["bbox"]
    assert [item["area"] for item in result.coco(min_area=2)] == [40]
    assert len(find_regions(result.mask, anomaly_map)) == 2
