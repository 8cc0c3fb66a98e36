"""Pictures of results: the ramp, the fixed colour of T, overlays, outlines, sheets, PNG files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from saae_runtime import files, render
from saae_runtime.errors import FrameError, StorageError

LUMA = np.array([0.2126, 0.7152, 0.0722])
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


def test_ramp_gets_lighter_all_the_way() -> None:
    table = render.ramp()
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    luma = table @ LUMA
    assert np.all(np.diff(luma) >= 0), "a gray print must keep the order"
    assert luma[0] < 20
    assert luma[-1] > 235
    assert len(np.unique(table, axis=0)) > 250


def test_ramp_is_shared_and_cannot_be_changed() -> None:
    with pytest.raises(ValueError):
        render.ramp()[0, 0] = 1


def test_colorize_ends_and_middle() -> None:
    picture = render.colorize(np.array([[-5.0, 0.0, 5.0, 10.0, 99.0, np.nan]]), 0.0, 10.0)
    table = render.ramp()
    np.testing.assert_array_equal(picture[0, 0], table[0])
    np.testing.assert_array_equal(picture[0, 1], table[0])
    np.testing.assert_array_equal(picture[0, 2], table[128])
    np.testing.assert_array_equal(picture[0, 3], table[255])
    np.testing.assert_array_equal(picture[0, 4], table[255])
    np.testing.assert_array_equal(picture[0, 5], (128, 128, 128))


@given(threshold=st.floats(1e-6, 1e6), scale=st.floats(0.0, 50.0))
def test_threshold_has_one_colour_whatever_else_is_in_the_frame(threshold: float, scale: float) -> None:
    frame = np.array([[threshold, threshold * scale]], np.float32)
    np.testing.assert_array_equal(render.heatmap(frame, threshold)[0, 0], render.ramp()[128])


@given(
    hnp.arrays(np.float32, sizes, elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(-1e3, 1e3, allow_nan=False),
)
def test_heat_position_keeps_the_order_and_splits_at_the_threshold(values: np.ndarray, threshold: float) -> None:
    position = render.heat_position(values, threshold)
    assert position.dtype == np.float32
    assert np.all((position >= 0) & (position <= 1))
    order = np.argsort(values, axis=None)
    assert np.all(np.diff(position.reshape(-1)[order]) >= -1e-6)
    limit = np.float32(threshold)
    assert np.all(position[values > limit] >= 0.5)
    assert np.all(position[values <= limit] <= 0.5)


def test_heat_position_without_a_reachable_threshold() -> None:
    np.testing.assert_array_equal(render.heat_position(np.array([[0.0, 7.0]]), np.inf), [[0.0, 0.0]])


def test_far_below_the_threshold_the_product_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(render.overlay(frame, np.full((20, 30), 0.3), threshold=1.0), frame)


def test_overlay_changes_where_it_is_hot_and_outlines_the_mask() -> None:
    frame = np.full((20, 30, 3), 200, np.uint8)
    heat = np.zeros((20, 30), np.float32)
    heat[5:15, 10:20] = 5.0
    picture = render.overlay(frame, heat, heat > 1.0, threshold=1.0)
    np.testing.assert_array_equal(picture[5, 10:20], np.tile(render.DEFECT_COLOR, (10, 1)))
    assert not np.array_equal(picture[9, 15], frame[9, 15])
    np.testing.assert_array_equal(picture[0], frame[0])
    assert np.all(frame == 200), "the frame given is not drawn on"


def test_overlay_of_a_gray_frame_is_that_of_its_three_equal_channels() -> None:
    rng = np.random.default_rng(1)
    gray = rng.integers(0, 256, (9, 7), dtype=np.uint8)
    heat = rng.random((9, 7), dtype=np.float32)
    np.testing.assert_array_equal(
        render.overlay(gray, heat, heat > 0.5, threshold=0.5),
        render.overlay(np.dstack([gray] * 3), heat, heat > 0.5, threshold=0.5),
    )


@given(hnp.arrays(np.bool_, sizes), st.integers(1, 3))
def test_outline_is_inside_and_every_edge_pixel_is_in_it(mask: np.ndarray, width: int) -> None:
    line = render.outline(mask, width)
    assert not np.any(line & ~mask)
    height, breadth = mask.shape
    for y, x in np.argwhere(mask):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        edge = any(not (0 <= a < height and 0 <= b < breadth) or not mask[a, b] for a, b in around)
        if edge:
            assert line[y, x]
        elif width == 1:
            assert not line[y, x]


@pytest.mark.parametrize(
    ("frame", "heat"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.float32)),
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.float32)),
        (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.float32)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_are_named(frame: np.ndarray, heat: np.ndarray) -> None:
    with pytest.raises(FrameError) as caught:
        render.overlay(frame, heat, threshold=1.0)
    assert caught.value.why
    assert caught.value.cure


def test_sheet_holds_the_panels_in_order() -> None:
    frame = np.full((240, 300, 3), 90, np.uint8)
    heat = np.zeros((240, 300), np.float32)
    heat[20:40, 30:50] = 4.0
    three = render.sheet(frame, heat, heat > 1, 1.0)
    four = render.sheet(frame, heat, heat > 1, 1.0, truth=heat > 2, title="zipper 007")
    assert four.shape[1] == three.shape[1] + 300 + 8
    assert four.shape[0] > three.shape[0]
    top = three.shape[0] - 8 - 240
    panels = [three[top : top + 240, left : left + 300] for left in (8, 316, 624)]
    np.testing.assert_array_equal(panels[0], frame)
    np.testing.assert_array_equal(panels[1], render.heatmap(heat, 1.0))
    np.testing.assert_array_equal(panels[2], render.overlay(frame, heat, heat > 1, threshold=1.0))


def test_sheet_of_a_small_frame_shows_square_pixels() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = render.sheet(frame, np.zeros((60, 80)), None, 1.0)
    top = picture.shape[0] - 8 - 240
    np.testing.assert_array_equal(picture[top : top + 240, 8:328], np.kron(frame, np.ones((4, 4, 1), np.uint8)))


def test_sheet_of_a_large_frame_is_brought_down() -> None:
    tall = render.sheet(np.zeros((2000, 100, 3), np.uint8), np.zeros((2000, 100)), None, 1.0)
    assert tall.shape[0] < 600


@given(
    st.one_of(
        hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
        hnp.arrays(np.uint8, sizes),
        hnp.arrays(np.bool_, sizes),
    )
)
def test_png_gives_the_pixels_back(picture: np.ndarray) -> None:
    back = np.asarray(Image.open(io.BytesIO(render.encode_png(picture))))
    np.testing.assert_array_equal(back, picture.astype(np.uint8) * 255 if picture.dtype == bool else picture)


@pytest.mark.parametrize("picture", [np.zeros((3, 3)), np.zeros((3, 3, 4), np.uint8), np.zeros(3, np.uint8)])
def test_png_of_something_else_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(FrameError):
        render.encode_png(picture)


def test_failed_write_keeps_the_picture_that_was_there(tmp_path, monkeypatch) -> None:
    target = tmp_path / "a" / "heat.png"
    render.save_png(target, np.zeros((2, 2), np.uint8))
    before = target.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        render.save_png(target, np.ones((2, 2), np.uint8))
    assert target.read_bytes() == before
    assert [entry.name for entry in target.parent.iterdir()] == ["heat.png"]
