"""Frames: what is taken, and what a person is told about the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saae_runtime.errors import FrameError
from saae_runtime.frames import MOST_ASPECT, MOST_PIXELS, as_frames, enough_memory, to_batch
from saae_runtime.geometry import resize_frames

rng = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def test_sixteen_bits_are_taken_with_a_white_level_alone() -> None:
    wide = np.array([[0, 2048, 4095, 9999]], np.uint16)
    with pytest.raises(FrameError, match="uint16"):
        as_frames(wide)
    for value in (wide, [wide], wide[None, :, :, None]):
        (frame,) = as_frames(value, 4095).items
        np.testing.assert_array_equal(frame[:, :, 0], [[0, 128, 255, 255]])
    with pytest.raises(FrameError, match="int32"):
        as_frames(wide.astype(np.int32), 4095)


@pytest.mark.parametrize(
    ("shape", "single", "count"),
    [
        ((5, 7), True, 1),
        ((5, 7, 1), True, 1),
        ((5, 7, 3), True, 1),
        ((1, 1, 3), True, 1),
        ((4, 5, 7, 1), False, 4),
        ((4, 5, 7, 3), False, 4),
        ((1, 5, 7, 3), False, 1),
        ((0, 5, 7, 3), False, 0),
    ],
)
def test_accepted_shapes(shape: tuple[int, ...], single: bool, count: int) -> None:
    value = pixels(*shape)
    frames = as_frames(value)
    assert frames.single is single
    assert len(frames.items) == count
    for index, item in enumerate(frames.items):
        source = value if single else value[index]
        assert item.dtype == np.uint8
        assert item.shape == (*source.shape[:2], 3)
        expected = source if source.ndim == 3 else source[:, :, None]
        np.testing.assert_array_equal(item, np.broadcast_to(expected, item.shape))


def test_lists_of_mixed_sizes() -> None:
    frames = as_frames([pixels(4, 5), pixels(6, 7, 3), pixels(8, 9, 1)])
    assert [item.shape for item in frames.items] == [(4, 5, 3), (6, 7, 3), (8, 9, 3)]
    assert not frames.single
    assert as_frames([]).items == ()
    assert not as_frames((pixels(4, 5),)).single


def test_not_contiguous() -> None:
    big = pixels(20, 30, 3)
    for view in (big[::2, ::3], big[:, ::-1], big[..., ::-1], np.asfortranarray(big), big.transpose(1, 0, 2)):
        batch = to_batch(as_frames(view).items, view.shape[:2])
        assert batch.flags.c_contiguous
        np.testing.assert_array_equal(batch[0], view)


def test_anything_that_numpy_reads() -> None:
    class Camera:
        def __init__(self) -> None:
            self.data = pixels(4, 6, 3)
            self.__array_interface__ = self.data.__array_interface__

    camera = Camera()
    np.testing.assert_array_equal(as_frames(camera).items[0], camera.data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((5, 7, 3), np.float32), ["float32", "(5, 7, 3)", "frame * 255"]),
        (np.zeros((5, 7), np.float64), ["float64", "(5, 7)", "frame * 255"]),
        (np.zeros((5, 7), np.uint16), ["uint16", "white_level=4095"]),
        (np.zeros((5, 7), bool), ["bool", "* 255"]),
        (np.zeros((5, 7), np.int64), ["int64", "astype"]),
        (np.zeros((5, 7, 4), np.uint8), ["(5, 7, 4)", "uint8", "[..., :3]"]),
        (np.zeros((5, 7, 2), np.uint8), ["(5, 7, 2)", "[..., 0]"]),
        (np.zeros((3, 50, 70), np.uint8), ["(3, 50, 70)", "transpose(1, 2, 0)"]),
        (np.zeros((2, 3, 50, 70), np.uint8), ["(2, 3, 50, 70)", "transpose(0, 2, 3, 1)"]),
        (np.zeros((8, 50, 70), np.uint8), ["(8, 50, 70)", "[..., None]"]),
        (np.zeros((8, 50, 70, 5), np.uint8), ["(8, 50, 70, 5)"]),
        (np.zeros(7, np.uint8), ["(7,)"]),
        (np.zeros((1, 2, 3, 4, 3), np.uint8), ["(1, 2, 3, 4, 3)"]),
        (np.zeros((0, 7, 3), np.uint8), ["(0, 7, 3)", "empty"]),
        (np.zeros((2, 5, 0, 3), np.uint8), ["(2, 5, 0, 3)", "empty"]),
        (np.array(None, dtype=object), ["object", "()"]),
        (None, ["NoneType"]),
        (5, ["int"]),
        ("frame.png", ["path", "read_image"]),
        (Image.new("P", (4, 4)), ["PIL", "read_image"]),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.float32)], ["Frame 1 of the list", "float32"]),
        ([[1, 2], [3, 4]], ["Frame 0 of the list", "list"]),
        ([np.zeros((2, 4, 4, 3), np.uint8)], ["Frame 0 of the list", "(2, 4, 4, 3)"]),
    ],
)
def test_refused_with_a_cure(value: object, words: list[str]) -> None:
    with pytest.raises(FrameError) as caught:
        as_frames(value)
    for word in words:
        assert word in str(caught.value)


def test_an_array_on_a_device_that_numpy_cannot_read() -> None:
    class Elsewhere:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    with pytest.raises(FrameError, match="copy it to the host"):
        as_frames(Elsewhere())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24), st.integers(1, 3))
def test_batches_are_resized_as_everywhere_else(h: int, w: int, height: int, width: int, count: int) -> None:
    frames = [pixels(h, w, 3) for _ in range(count)]
    batch = to_batch(frames, (height, width))
    assert batch.shape == (count, height, width, 3)
    assert batch.flags.c_contiguous
    for frame, resized in zip(frames, batch, strict=True):
        np.testing.assert_array_equal(resized, resize_frames(frame, (height, width)))


def test_one_frame_of_the_right_size_is_not_copied() -> None:
    frame = pixels(8, 9, 3)
    assert np.shares_memory(to_batch([frame], (8, 9)), frame)


@pytest.mark.parametrize(
    "shape", [(MOST_ASPECT + 1, 1), (1, MOST_ASPECT + 1, 3), (2, MOST_ASPECT * 3 + 1, 3, 3), (1 << 16, 1 << 15)]
)
def test_too_large_or_too_thin(shape: tuple[int, ...]) -> None:
    with pytest.raises(FrameError, match=r"pixels") as caught:
        as_frames(np.broadcast_to(np.uint8(0), shape))
    assert "cut it into parts" in caught.value.cure


def test_the_largest_and_the_thinnest_are_taken() -> None:
    side = int(MOST_PIXELS**0.5)
    for shape in ((MOST_ASPECT, 1), (1, MOST_ASPECT, 3), (side, side)):
        assert as_frames(np.broadcast_to(np.uint8(0), shape)).single


class Raising:
    """An object whose own code fails when it is read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise self.error


class NoName:
    __module__ = None  # type: ignore[assignment]


class RaisingProperty:
    @property
    def __array_interface__(self) -> dict:
        raise KeyError("interface")


@pytest.mark.parametrize(
    "value", [Raising(KeyError("x")), Raising(OSError("x")), Raising(AssertionError()), NoName(), RaisingProperty()]
)
def test_what_a_frames_own_code_raises_is_an_error_of_the_frame(value: object) -> None:
    for form in (value, [value]):
        with pytest.raises(FrameError):
            as_frames(form)


def test_an_interrupt_in_a_frames_own_code_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        as_frames(Raising(KeyboardInterrupt()))


def test_masked_pixels_are_not_judged() -> None:
    frame = pixels(5, 7, 3)
    with pytest.raises(FrameError, match="masked") as caught:
        as_frames(np.ma.masked_array(frame, mask=np.ones_like(frame)))
    assert "filled" in caught.value.cure
    with pytest.raises(FrameError, match="1 of 105 values"):
        as_frames(np.ma.masked_array(frame, mask=np.arange(105).reshape(frame.shape) == 3))
    for plain in (np.ma.masked_array(frame), np.ma.masked_array(frame, mask=np.zeros_like(frame))):
        (item,) = as_frames(plain).items
        assert type(item) is np.ndarray
        np.testing.assert_array_equal(item, frame)


def test_want_of_memory_is_an_error_of_the_frame() -> None:
    with pytest.raises(FrameError, match="5 x 7 pixels"), enough_memory([(1, 1), (5, 7)]):
        raise MemoryError
    with pytest.raises(FrameError, match="3 x 4 pixels"), enough_memory([pixels(3, 4, 3)]):
        np.empty(1 << 60, np.uint8)
