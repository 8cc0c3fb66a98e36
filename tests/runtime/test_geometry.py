"""The two-matrix resize against Pillow, the upsample against torch and by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need
from PIL import Image

from saae_runtime import geometry
from saae_runtime.errors import ConfigError
from saae_runtime.geometry import gaussian_matrix, resize_frames, resize_matrix, upsample_map, upsample_matrix

SIDE = st.integers(1, 90)


LEVEL = 1.0 + 1e-4
"""One grey level, and what float32 sums may add to it."""


def two_matrices(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = resize_matrix(frame.shape[0], size[0]), resize_matrix(frame.shape[1], size[1])
    return np.einsum("oh,hwc,pw->opc", rows, frame.astype(np.float32), columns, optimize=True)


@settings(deadline=None, max_examples=150)
@given(height=SIDE, width=SIDE, to_height=SIDE, to_width=SIDE, seed=st.integers(0, 2**32 - 1))
def test_resize_is_pillows_bilinear_within_a_grey_level(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    # Pure noise is the hardest picture: a tap too many or too few moves it by many levels.
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    found = two_matrices(frame, (to_height, to_width))
    image = Image.fromarray(frame).resize((to_width, to_height), Image.Resampling.BILINEAR)
    assert np.abs(found - np.asarray(image, np.float32)).max() <= LEVEL


@pytest.mark.parametrize(
    ("before", "after"), [((1080, 1920), (384, 384)), ((900, 900), (392, 392)), ((64, 48), (392, 518))]
)
def test_resize_at_camera_sizes(before: tuple[int, int], after: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    expected = np.asarray(Image.fromarray(frame).resize(after[::-1], Image.Resampling.BILINEAR), np.float32)
    assert np.abs(two_matrices(frame, after) - expected).max() <= LEVEL


def test_resize_by_hand() -> None:
    # Halving: the triangle is four pixels wide, weights 1 3 3 1 over 8; at the border what is left is renormalised.
    expected = np.array([[3, 3, 1, 0, 0, 0], [0, 7 / 8, 21 / 8, 21 / 8, 7 / 8, 0], [0, 0, 0, 1, 3, 3]]) / 7
    np.testing.assert_allclose(resize_matrix(6, 3), expected, atol=1e-7)
    np.testing.assert_array_equal(resize_matrix(5, 5), np.eye(5, dtype=np.float32))


@settings(deadline=None)
@given(n_in=st.integers(1, 400), n_out=st.integers(1, 400))
def test_rows_are_averages(n_in: int, n_out: int) -> None:
    for make in (resize_matrix, upsample_matrix):
        matrix = make(n_in, n_out)
        assert matrix.shape == (n_out, n_in)
        assert matrix.dtype == np.float32
        assert matrix.min() >= 0.0
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
        # A mirrored picture gives the mirrored result.
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-5)


def test_matrices_are_shared_and_cannot_be_changed() -> None:
    for matrix in (resize_matrix(9, 4), upsample_matrix(4, 9), gaussian_matrix(7, 1.0)):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 1.0
    assert resize_matrix(9, 4) is resize_matrix(9, 4)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), to_height=SIDE, to_width=SIDE, seed=st.integers(0, 99))
def test_upsample_is_torchs_interpolate(height: int, width: int, to_height: int, to_width: int, seed: int) -> None:
    torch = need("torch")
    maps = np.random.default_rng(seed).normal(size=(2, height, width)).astype(np.float32)
    # In float64: in float32 torch rounds the positions, too.
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(maps).double()[:, None], size=(to_height, to_width), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    np.testing.assert_allclose(upsample_map(maps, (to_height, to_width)), expected, atol=2e-6)


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), to_height=SIDE, to_width=SIDE, seed=st.integers(0, 99))
def test_upsample_is_the_product_of_the_two_matrices(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    # The exported graph multiplies by these matrices; the host leaves their zeros out.
    maps = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    rows = upsample_matrix(height, to_height).astype(np.float64)
    columns = upsample_matrix(width, to_width).astype(np.float64)
    np.testing.assert_allclose(upsample_map(maps, (to_height, to_width)), rows @ maps @ columns.T, atol=1e-6)


def test_upsample_by_hand() -> None:
    # Centres of four pixels over two values: -0.25, 0.25, 0.75, 1.25; outside the first and last centre it is flat.
    expected = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], np.float32)
    np.testing.assert_array_equal(upsample_matrix(2, 4), expected)
    found = upsample_map(np.array([[0.0, 4.0]], np.float32), (1, 4))
    np.testing.assert_array_equal(found, np.array([[0, 1, 3, 4]], np.float32))


def test_upsample_keeps_rank_dtype_and_a_map_of_that_size() -> None:
    one = np.random.default_rng(0).random((3, 5), np.float32)
    batch = np.stack([one, one * 2])
    assert upsample_map(one, (3, 5)) is one
    large = upsample_map(batch, (12, 10))
    assert large.shape == (2, 12, 10)
    assert large.dtype == np.float32
    np.testing.assert_allclose(large[0], upsample_map(one, (12, 10)), rtol=1e-6)
    np.testing.assert_allclose(large[1], 2 * large[0], rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 2.5])
def test_gaussian_is_scipys_away_from_the_border(sigma: float) -> None:
    ndimage = need("scipy.ndimage")
    matrix = gaussian_matrix(41, sigma)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)
    impulse = np.zeros(41)
    impulse[20] = 1.0
    np.testing.assert_allclose(matrix[20], ndimage.gaussian_filter1d(impulse, sigma, truncate=8), atol=1e-6)
    # At the border nothing is lost and nothing comes from outside.
    assert matrix[0, 0] > matrix[20, 20]
    np.testing.assert_allclose(matrix @ np.ones(41), 1.0, atol=1e-6)


def test_gaussian_of_zero_changes_nothing() -> None:
    np.testing.assert_array_equal(gaussian_matrix(4, 0.0), np.eye(4, dtype=np.float32))


def test_resize_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), np.uint8)
    found = resize_frames(frames, (9, 44))
    assert found.shape == (3, 9, 44, 3)
    assert found.dtype == np.uint8
    for frame, small in zip(frames, found, strict=True):
        np.testing.assert_array_equal(resize_frames(frame, (9, 44)), small)
        assert np.abs(two_matrices(frame, (9, 44)) - small).max() <= LEVEL
    assert resize_frames(frames, (20, 31)) is frames
    # A view with strides, as a cropped camera buffer is one.
    view = frames[0, ::-1, 3:23]
    np.testing.assert_array_equal(resize_frames(view, (8, 8)), resize_frames(view.copy(), (8, 8)))


@pytest.mark.parametrize(
    ("before", "after", "cut"),
    [
        ((1024, 1024), (392, 392), 2),
        ((768, 1024), (768, 392), 4),
        ((1000, 700), (392, 518), 3),
        ((641, 480), (384, 384), 1),
    ],
)
@pytest.mark.parametrize("gray", [False, True])
def test_bands_are_resized_as_the_whole(before: tuple[int, int], after: tuple[int, int], cut: int, gray: bool) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    frame = np.broadcast_to(frame[:, :, :1], frame.shape) if gray else frame
    handed: list[int] = []

    def run(call, items):  # as a pool's map: all are taken before any is done
        bands = list(items)
        handed.append(len(bands))
        return [call(band) for band in reversed(bands)][::-1]

    found = resize_frames(frame, after, cut, run)
    assert handed == ([cut] if cut > 1 else [])
    np.testing.assert_array_equal(found, resize_frames(frame, after))


def test_small_frames_and_awkward_sizes_are_not_cut() -> None:
    def run(call, items):
        raise AssertionError("handed out")

    for before, after in (((100, 100), (50, 50)), ((1009, 700), (392, 392))):
        frame = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
        np.testing.assert_array_equal(resize_frames(frame, after, 4, run), resize_frames(frame, after))


@settings(deadline=None, max_examples=40)
@given(height=SIDE, width=SIDE, to_height=SIDE, to_width=SIDE, seed=st.integers(0, 99))
def test_a_gray_frame_is_resized_as_three_equal_channels(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    gray = np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8)
    shown = np.broadcast_to(gray, (height, width, 3))
    np.testing.assert_array_equal(
        resize_frames(shown, (to_height, to_width)), resize_frames(np.repeat(gray, 3, axis=2), (to_height, to_width))
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: resize_matrix(0, 4),
        lambda: resize_matrix(4, 0),
        lambda: upsample_matrix(-1, 4),
        lambda: gaussian_matrix(0, 1.0),
        lambda: gaussian_matrix(4, -1.0),
        lambda: gaussian_matrix(4, float("nan")),
        lambda: resize_frames(np.zeros((4, 4, 3), np.uint8), (0, 4)),
        lambda: upsample_map(np.zeros((4, 4), np.float32), (4, 0)),
    ],
)
def test_impossible_sizes_are_refused(call) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        call()


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (40_000, 40)])
def test_upsampling_a_long_thin_map_takes_memory_like_its_result(size: tuple[int, int]) -> None:
    # Whole matrices would take 60,000 x 392 x 12 bytes, more than a hundred times this.
    maps = np.random.default_rng(0).random((392, 392), np.float32)
    tracemalloc.start()
    try:
        found = upsample_map(maps, size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.shape == size
    assert peak < 8 * found.nbytes + 4 * 392 * max(size[1], 392) + (16 << 20)


def test_matrices_are_kept_up_to_a_number_of_bytes() -> None:
    made: list[int] = []

    @geometry._kept(lambda matrix: matrix.nbytes, limit=1000)
    def make(n: int) -> np.ndarray:
        made.append(n)
        return np.zeros(n, np.uint8)

    for n in (400, 500, 400, 300, 400, 500, 2000, 2000):
        assert len(make(n)) == n
    # 300 pushes out 500, the one used least recently; 500 then pushes out 300; 2000 is never kept and pushes none out.
    assert made == [400, 500, 300, 500, 2000, 2000]
    make(400)
    make(500)
    assert made == [400, 500, 300, 500, 2000, 2000]
