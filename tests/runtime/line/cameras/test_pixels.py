"""Pixel formats: what comes out is what the format means, for any size and padding, and errors say what to do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import ConfigError
from saae_runtime.line.camera import BadFrameError
from saae_runtime.line.cameras.pixels import FORMATS, to_rgb

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(FORMATS), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_format_means_its_colours(size: tuple[int, int], pixel_format: str, padding: int, rng: object) -> None:
    height, width = size
    seed = np.random.default_rng(rng.randrange(2**32))  # type: ignore[attr-defined]
    if pixel_format.startswith("Mono"):
        bits = int(pixel_format.removeprefix("Mono"))
        kind = np.uint8 if bits == 8 else np.uint16
        gray = seed.integers(0, 1 << bits, size).astype(kind)
        padded = np.pad(gray, ((0, 0), (0, padding)))
        expected = np.round(gray.astype(np.float64) * 255 / ((1 << bits) - 1))
        found = to_rgb(padded.reshape(-1), pixel_format, size)
        assert np.abs(found.astype(float) - expected[:, :, None]).max() <= 0.5 + 1e-9
        if bits > 8:  # the same as bytes
            assert np.array_equal(to_rgb(padded.reshape(-1).view(np.uint8), pixel_format, size), found)
    else:
        rgb = seed.integers(0, 256, (*size, 3)).astype(np.uint8)
        channels = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}[pixel_format[:3].upper()]
        raw = rgb[:, :, channels]
        if "a8" in pixel_format or "A8" in pixel_format:
            raw = np.dstack([raw, seed.integers(0, 256, size).astype(np.uint8)])
        lines = np.pad(raw.reshape(height, -1), ((0, 0), (0, padding)))
        found = to_rgb(lines, pixel_format, size)
        assert np.array_equal(found, rgb)
    assert (found.shape, found.dtype) == ((height, width, 3), np.uint8)
    assert found.flags.owndata or found.base is not lines


def test_a_white_level_of_its_own() -> None:
    gray = np.array([[0, 1000, 2000]], np.uint16)
    assert to_rgb(gray, "Mono16", (1, 3), 2000)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("pixel_format", ["BayerRG8", "Mono12p", "YUV422_8", "Coord3D_ABC32f"])
def test_what_is_not_taken_says_what_to_set(pixel_format: str) -> None:
    with pytest.raises(ConfigError, match="pixel_format to RGB8"):
        to_rgb(np.zeros(100, np.uint8), pixel_format, (10, 10))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=60))
def test_a_buffer_of_any_length_is_a_frame_or_a_bad_one(pixel_format: str, data: bytes) -> None:
    try:
        found = to_rgb(np.frombuffer(data, np.uint8), pixel_format, (3, 4))
    except BadFrameError:
        return
    assert found.shape == (3, 4, 3)
