"""Connected regions, against a flood fill."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saae_runtime.regions import defect_mask, find_regions, region_masks


def flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The 8-connected sets of pixels (y, x), one pixel at a time."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        stack = [left.pop()]
        region = set(stack)
        while stack:
            y, x = stack.pop()
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    region.add(near)
                    stack.append(near)
        found.append(region)
    return found


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14)),
    st.integers(0, 2**31),
)
def test_equals_a_flood_fill(mask: np.ndarray, seed: int) -> None:
    anomaly_map = np.random.default_rng(seed).permutation(mask.size).reshape(mask.shape).astype(np.float32)
    expected = set()
    for pixels in flood(mask):
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        y, x = max(pixels, key=lambda pixel: anomaly_map[pixel])
        bbox = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        expected.add((bbox, len(pixels), (x, y), float(anomaly_map[y, x])))
    regions = find_regions(mask, anomaly_map)
    assert {(r.bbox, r.area, r.peak, r.score) for r in regions} == expected
    assert len(regions) == len(expected)
    assert [r.score for r in regions] == sorted((r.score for r in regions), reverse=True)


def test_long_winding_regions() -> None:
    mask = np.zeros((101, 101), bool)
    mask[::4] = True
    mask[2::4] = True
    mask[:, ::2] |= False
    for row in range(0, 100, 4):  # a snake: rows joined at alternating ends
        mask[row + 1, 100 if row % 8 == 0 else 0] = True
    for row in range(2, 98, 4):
        mask[row + 1, 100 if row % 8 == 2 else 0] = True
    regions = find_regions(mask, np.ones(mask.shape, np.float32))
    assert len(regions) == len(flood(mask))
    assert sum(r.area for r in regions) == mask.sum()


def test_spiral_is_one_region() -> None:
    mask = np.zeros((41, 41), bool)
    top, left, bottom, right = 0, 0, 40, 40
    while top <= bottom and left <= right:
        mask[top, left : right + 1] = True
        mask[top : bottom + 1, right] = True
        mask[bottom, left + 2 : right + 1] = True
        mask[top + 2 : bottom + 1, left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    regions = find_regions(mask, np.ones(mask.shape, np.float32))
    assert len(regions) == len(flood(mask))


def test_min_area_and_empty() -> None:
    mask = np.zeros((10, 10), bool)
    assert find_regions(mask, np.zeros((10, 10), np.float32)) == ()
    mask[0, 0] = True
    mask[5:8, 5:8] = True
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[6, 7] = 2.0
    anomaly_map[0, 0] = 9.0
    assert len(find_regions(mask, anomaly_map)) == 2
    (region,) = find_regions(mask, anomaly_map, min_area=2)
    assert region.bbox == (5, 5, 8, 8)
    assert region.area == 9
    assert region.peak == (7, 6)
    assert region.score == 2.0


def test_corners_touch() -> None:
    mask = np.eye(5, dtype=bool)
    assert len(find_regions(mask, np.zeros((5, 5), np.float32))) == 1
    assert len(find_regions(mask[::-1], np.zeros((5, 5), np.float32))) == 1


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 9)
    ),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_defects_are_the_outlined_areas_whose_peak_decides(anomaly_map: np.ndarray, pixel: int, image: int) -> None:
    found = defect_mask(anomaly_map, pixel, image, float(anomaly_map.max()))
    assert found.any() == (anomaly_map.max() > image)  # verdict and outline never contradict each other
    expected = np.zeros_like(found)
    for area in flood(anomaly_map > min(pixel, image)):
        if max(anomaly_map[place] for place in area) > image:
            for place in area:
                expected[place] = True
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=300, deadline=None)
@given(st.floats(0.5, 100, width=32), st.floats(-2, 2), st.floats(-2, 2))
def test_thresholds_next_to_the_peak(peak: float, pixel: float, image: float) -> None:
    """Thresholds are float64 and maps float32: however the two are rounded, a verdict has its outline."""
    anomaly_map = np.array([[0.25, 0.25, peak]], np.float32)
    step = float(np.spacing(np.float32(peak)))
    found = defect_mask(anomaly_map, peak + pixel * step, peak + image * step, peak)
    np.testing.assert_array_equal(found, [[False, False, peak > peak + image * step]])


def test_a_map_that_was_resized_below_its_score_still_shows_its_peak() -> None:
    anomaly_map = np.array([[1.0, 1.0, 4.9], [1.0, 3.0, 1.0]], np.float32)
    found = defect_mask(anomaly_map, 2.0, 5.0, score=5.1)
    np.testing.assert_array_equal(found, anomaly_map > 2.0)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=10), elements=st.integers(-1, 2))
)
def test_the_first_of_equal_values_in_reading_order_is_the_peak(values: np.ndarray) -> None:
    anomaly_map = values.astype(np.float32)
    mask = values > 0
    peaks = set()
    for pixels in flood(mask):
        y, x = min(pixels, key=lambda pixel: (-anomaly_map[pixel], pixel))
        peaks.add((x, y))
    assert {region.peak for region in find_regions(mask, anomaly_map)} == peaks


def test_no_pixel_is_sorted(monkeypatch) -> None:
    """A mask that covers a large frame would take seconds otherwise."""
    sizes: list[int] = []
    for name in ("lexsort", "argsort", "sort", "unique"):
        real = getattr(np, name)

        def counted(values, *arguments, _real=real, **options):
            sizes.append(np.shape(values)[-1])
            return _real(values, *arguments, **options)

        monkeypatch.setattr(np, name, counted)
    mask = np.ones((50, 400), bool)
    (region,) = find_regions(mask, np.arange(mask.size, dtype=np.float32).reshape(mask.shape))
    assert region.peak == (399, 49)
    assert max(sizes) <= 50  # runs


@settings(deadline=None)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)), st.integers(1, 3))
def test_each_region_with_its_own_pixels(mask: np.ndarray, min_area: int) -> None:
    anomaly_map = np.random.default_rng(0).random(mask.shape, np.float32)
    found = list(region_masks(mask, anomaly_map, min_area))
    assert tuple(region for region, _ in found) == find_regions(mask, anomaly_map, min_area)
    expected = [part for part in flood(mask) if len(part) >= min_area]
    assert {frozenset(zip(*map(tuple, np.nonzero(own)), strict=True)) for _, own in found} == set(
        map(frozenset, expected)
    )
    for region, own in found:
        assert region.area == own.sum()
        assert region.score == anomaly_map[own].max()
