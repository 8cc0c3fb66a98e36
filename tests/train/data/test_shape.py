"""The input size follows the images' shape."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saae_train.data.category import Sample
from saae_train.data.shape import follow_shape, image_size, typical_shape


def samples(folder: Path, *sizes: tuple[int, int]) -> list[Sample]:
    found = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.new("L", (width, height)).save(path)
        found.append(Sample(path, "good", None, False))
    return found


def test_one_size(tmp_path: Path) -> None:
    shape = typical_shape(samples(tmp_path, (30, 40), (30, 40)))
    assert shape is not None
    assert (shape.size, shape.shared, shape.mixed) == ((30, 40), True, False)
    assert typical_shape([]) is None


def test_the_median_of_several_and_whether_they_are_mixed(tmp_path: Path) -> None:
    shape = typical_shape(samples(tmp_path, (30, 40), (33, 40), (31, 40)))
    assert shape is not None
    assert shape.size == (31, 40)
    assert not shape.shared
    assert not shape.mixed
    tall = typical_shape(samples(tmp_path, (30, 40), (40, 30), (30, 40)))
    assert tall is not None
    assert tall.size == (30, 40)
    assert tall.mixed


def test_a_turned_image_counts_as_it_is_read(tmp_path: Path) -> None:
    image = Image.new("L", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(Sample(tmp_path / "turned.jpg", "good", None, False)) == (40, 30)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 512), (336, 336)),
        ((1024, 1024), (336, 336)),
        ((576, 768), (294, 392)),
        ((768, 576), (392, 294)),
        ((305, 768), (210, 532)),
    ],
)
def test_known_shapes_at_the_positions_of_336(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert follow_shape((336, 336), shape, 14) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([(336, 336), (280, 280), (384, 384), (448, 224)]),
    st.integers(50, 5000),
    st.integers(50, 5000),
    st.sampled_from([14, 16]),
)
def test_positions_and_ratio_hold(budget: tuple[int, int], height: int, width: int, step: int) -> None:
    found = follow_shape(budget, (height, width), step)
    assert found[0] % step == found[1] % step == 0
    positions = (budget[0] // step) * (budget[1] // step)
    count = found[0] * found[1] // step**2
    assert 0.85 * positions <= count <= 1.03 * positions
    wanted = min(max(height / width, 0.25), 4.0)
    assert abs(math.log(found[0] / found[1] / wanted)) < 0.06
    assert follow_shape(found, (height, width), step)[0] * found[1] == pytest.approx(
        found[0] * follow_shape(found, (height, width), step)[1], rel=0.06
    )
