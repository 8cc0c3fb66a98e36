"""TIFF files of numbers, as tifffile and Pillow read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from saae_runtime.errors import FrameError
from saae_runtime.tiff import encode_tiff


@settings(deadline=None)
@given(
    st.sampled_from([np.float16, np.float32, np.float64, ">f4"]).flatmap(
        lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=2, max_dims=2, max_side=30))
    )
)
def test_every_bit_comes_back(values: np.ndarray) -> None:
    found = tifffile.imread(io.BytesIO(encode_tiff(values)))
    assert found.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, values)


def test_pillow_reads_it_too() -> None:
    values = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_tiff(values[::2])))), values[::2])


@pytest.mark.parametrize("values", [np.zeros((2, 2), int), np.zeros((2, 2, 3)), np.zeros((0, 2))])
def test_what_is_no_map_is_refused(values: np.ndarray) -> None:
    with pytest.raises(FrameError):
        encode_tiff(values)
