"""Image files as the toolkit reads them: modes, depth, rotation, and files that are none."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deep_colour import deep_png, deep_ppm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from needs import need
from PIL import Image

from saae_runtime.errors import ConfigError, DataError, ImageError
from saae_runtime.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    PIXELS_VARIABLE,
    check_white_level,
    read_image,
    read_image_bytes,
    read_mask,
    read_pages,
    to_eight_bits,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def of_mode(array: np.ndarray, mode: str) -> Image.Image:
    """An image of exactly this mode from raw bytes, whatever Pillow would guess from the array."""
    return Image.frombytes(mode, array.shape[1::-1], np.ascontiguousarray(array).tobytes())


def three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[:, :, None], 3, axis=2)


def check(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_rgb(tmp_path: Path, suffix: str) -> None:
    check(read_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(COLOUR))), COLOUR)


def test_gray_is_repeated(tmp_path: Path) -> None:
    check(read_image(saved(tmp_path / "a.png", Image.fromarray(RAMP))), three(RAMP))


def test_one_bit(tmp_path: Path) -> None:
    bits = RAMP % 3 == 0
    check(read_image(saved(tmp_path / "a.png", Image.fromarray(bits))), three(bits.astype(np.uint8) * 255))


def test_palette(tmp_path: Path) -> None:
    colours = np.array([[200, 10, 30], [0, 255, 0], [1, 2, 3], [90, 80, 70]], np.uint8)
    image = of_mode(RAMP % 4, "P")
    image.putpalette(colours.tobytes())
    check(read_image(saved(tmp_path / "a.png", image)), colours[RAMP % 4])
    # A transparent entry is a colour like any other.
    check(read_image(saved(tmp_path / "b.png", image, transparency=1)), colours[RAMP % 4])


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    alpha = np.where(RAMP > 100, 0, 128).astype(np.uint8)
    check(read_image(saved(tmp_path / "a.png", of_mode(np.dstack([COLOUR, alpha]), "RGBA"))), COLOUR)
    check(read_image(saved(tmp_path / "b.png", of_mode(np.dstack([RAMP, alpha]), "LA"))), three(RAMP))


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:4, :, 0] = 255  # cyan above, black below
    ink[4:, :, 3] = 255
    found = read_image(saved(tmp_path / "a.tif", of_mode(ink, "CMYK")))
    check(found, np.where(np.arange(8)[:, None, None] < 4, [0, 255, 255], [0, 0, 0]).repeat(8, axis=1).astype(np.uint8))


WIDE = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_scaled_over_its_full_range(tmp_path: Path, name: str) -> None:
    expected = np.rint(WIDE / 257.0).astype(np.uint8)
    check(read_image(saved(tmp_path / name, Image.fromarray(WIDE))), three(expected))
    # A dark frame stays dark: its own minimum and maximum play no part.
    check(
        read_image(saved(tmp_path / name, Image.fromarray(WIDE // 16))),
        three(np.rint(WIDE // 16 / 257.0).astype(np.uint8)),
    )


def test_16_bit_big_endian(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", of_mode(WIDE.astype(">u2"), "I;16B"))
    with Image.open(path) as image:
        assert image.mode == "I;16B"
    check(read_image(path), three(np.rint(WIDE / 257.0).astype(np.uint8)))


def test_16_bit_pgm(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n16 16\n65535\n" + WIDE.astype(">u2").tobytes())
    check(read_image(path), three(np.rint(WIDE / 257.0).astype(np.uint8)))


def test_32_bit_integers_only_within_16_bits(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", of_mode(WIDE.astype(np.int32), "I"))
    check(read_image(path), three(np.rint(WIDE / 257.0).astype(np.uint8)))
    for value in (70_000, -1):
        path = saved(tmp_path / "b.tif", of_mode(np.full((4, 4), value, np.int32), "I"))
        with pytest.raises(ImageError, match=r"b\.tif: 32-bit pixels outside"):
            read_image(path)


def test_floating_point_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)))
    with pytest.raises(ImageError, match=r"a\.tif: floating-point") as caught:
        read_image(path)
    assert "16-bit PNG" in caught.value.cure


UPRIGHT = {  # what turns the stored array upright, by EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {"RGB": COLOUR[:10], "L": RAMP[:10], "I;16": WIDE[:10]}[kind]
    path = saved(tmp_path / "a.png", Image.fromarray(stored), exif=exif)
    eight = np.rint(stored / 257.0).astype(np.uint8) if kind == "I;16" else stored
    check(read_image(path), UPRIGHT[orientation](eight if kind == "RGB" else three(eight)))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["L", "I;16", "I;16B"])
def test_rotated_gray_tiff_is_not_scrambled(tmp_path: Path, orientation: int, kind: str) -> None:
    stored = {"L": RAMP[:10], "I;16": WIDE[:10], "I;16B": WIDE[:10].astype(">u2")}[kind]
    path = saved(tmp_path / "a.tif", of_mode(stored, kind), tiffinfo={0x0112: orientation})
    eight = stored if kind == "L" else np.rint(stored / 257.0).astype(np.uint8)
    check(read_image(path), three(UPRIGHT[orientation](eight)))


def test_jpeg_decodes_as_pillow_does(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(COLOUR), quality=90)
    with Image.open(path) as image:
        check(read_image(path), np.asarray(image.convert("RGB")))


def pages(path: Path) -> list[np.ndarray | ImageError]:
    found = list(read_pages(path))
    assert [number for number, _, _ in found] == list(range(1, len(found) + 1))
    assert {count for _, count, _ in found} == {len(found)}
    return [page for _, _, page in found]


MANY = [COLOUR, 255 - COLOUR, COLOUR[::-1].copy()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.png", {"default_image": False}),
        ("a.webp", {"lossless": True}),
    ],
)
def test_every_page_is_read_and_never_the_first_alone(tmp_path: Path, name: str, options: dict) -> None:
    first, *rest = [Image.fromarray(page) for page in MANY]
    path = saved(tmp_path / name, first, save_all=True, append_images=rest, **options)
    for found, expected in zip(pages(path), MANY, strict=True):
        check(found, expected)
    with pytest.raises(ImageError, match="holds 3 pages") as caught:
        read_image(path)
    assert "each page" in caught.value.cure


def test_a_damaged_page_leaves_the_others_of_a_tiff(tmp_path: Path) -> None:
    first, *rest = [Image.fromarray(page) for page in MANY]
    path = saved(tmp_path / "a.tif", first, save_all=True, append_images=rest, compression="tiff_adobe_deflate")
    with Image.open(path) as image:
        image.seek(1)
        (offset,) = image.tag_v2[273]
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = pages(path)
    check(found[0], MANY[0])
    assert isinstance(found[1], ImageError)
    assert "a.tif#2" in found[1].what
    check(found[2], MANY[2])


def test_an_animation_that_is_cut_off_says_how_many_pages_are_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(4)]
    path = saved(tmp_path / "a.png", frames[0], save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = list(read_pages(path))
    assert isinstance(found[0][2], np.ndarray)
    errors = [page for _, _, page in found if isinstance(page, ImageError)]
    assert errors
    good = len(found) - len(errors)
    assert good + 1 + (f"{4 - good - 1} page" in str(errors[-1])) * (4 - good - 1) == 4


def test_a_thumbnail_inside_a_tiff_is_no_page(tmp_path: Path) -> None:
    whole, small = Image.fromarray(COLOUR), Image.fromarray(COLOUR[::4, ::4])
    small.encoderinfo = {"tiffinfo": {254: 1}}
    path = saved(tmp_path / "a.tif", whole, save_all=True, append_images=[small])
    with Image.open(path) as image:
        assert image.n_frames == 2
    check(read_image(path), COLOUR)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PCX", "ICO", "TGA", "PDF"])
def test_only_the_promised_formats_are_opened_whatever_the_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.png"
    Image.fromarray(COLOUR).save(path, format=kind)
    ran: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **options: ran.append(arguments))
    monkeypatch.setattr("subprocess.check_call", lambda *arguments, **options: ran.append(arguments))
    for reader in (read_image, read_mask):
        with pytest.raises(ImageError, match="cannot be read") as caught:
            reader(path)
        assert "PNG, JPEG, BMP, TIFF, WEBP, PPM" in caught.value.why
    assert not ran


@pytest.mark.parametrize("kind", FORMATS)
def test_a_promised_format_is_opened_under_any_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "part.bmp"
    Image.fromarray(COLOUR).save(path, format=kind)
    assert read_image(path).shape == COLOUR.shape


def test_the_limit_in_pixels_says_how_to_raise_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(np.zeros((64, 96), np.uint8)))
    monkeypatch.setenv(PIXELS_VARIABLE, "6000")
    for reader in (read_image, read_mask):
        with pytest.raises(ImageError, match="96 x 64 pixels are above") as caught:
            reader(path)
        assert f"export {PIXELS_VARIABLE}=6144" in caught.value.cure
        assert "remove" not in caught.value.cure
    monkeypatch.setenv(PIXELS_VARIABLE, "6144")
    assert read_image(path).shape == (64, 96, 3)
    for wrong in ("many", "0", "-3", "1e9", "9" * 400):
        monkeypatch.setenv(PIXELS_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=PIXELS_VARIABLE):
            read_image(path)


def test_the_limit_of_pillow_is_neither_asked_nor_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    check(read_image(path), COLOUR)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_line_is_no_image(tmp_path: Path) -> None:
    for shape in ((1, 3_000_000), (3_000_000, 1), (2, 2001)):
        path = saved(tmp_path / "a.png", Image.fromarray(np.zeros(shape, np.uint8)))
        with pytest.raises(ImageError, match="are a line, not an image"):
            read_image(path)
    assert read_image(saved(tmp_path / "b.png", Image.fromarray(np.zeros((2, 2000), np.uint8)))).shape[1] == 2000


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))
    with path.open("ab") as stream:
        stream.truncate(65 << 20)  # sparse
    monkeypatch.setenv(PIXELS_VARIABLE, "1000")
    with pytest.raises(ImageError, match="bytes are above") as caught:
        read_image(path)
    monkeypatch.setenv(PIXELS_VARIABLE, caught.value.cure.rpartition("=")[2])
    check(read_image(path), COLOUR)


@pytest.mark.parametrize("kind", ["fifo", "device", "endless", "socket", "link"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to({"device": "/dev/tty", "endless": "/dev/zero"}[kind])
    for reader in (read_image, read_mask):
        with pytest.raises(ImageError, match="not a regular file"):
            reader(path)


def test_too_little_memory_is_an_error_of_that_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "asarray", full)
    with pytest.raises(ImageError, match="not enough memory"):
        read_image(path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    whole = saved(
        tmp_path / "whole.png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    )
    data = whole.read_bytes()
    cases = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"this is not a picture\n" * 40, "cannot be read as an image"),
        "head.png": (data[:20], "cannot be read as an image"),
        "half.png": (data[: len(data) // 2], "cannot be read as an image"),
    }
    for name, (content, word) in cases.items():
        (tmp_path / name).write_bytes(content)
        for reader in (read_image, read_mask):
            with pytest.raises(ImageError, match=word) as caught:
                reader(tmp_path / name)
            assert caught.value.what.startswith(str(tmp_path / name))
            assert caught.value.cure
            assert isinstance(caught.value, DataError)
    for reader in (read_image, read_mask):
        with pytest.raises(ImageError, match=r"gone\.png: no such file"):
            reader(tmp_path / "gone.png")
        with pytest.raises(ImageError, match="cannot be read"):
            reader(tmp_path)


def test_truncated_jpeg_is_not_filled_with_gray(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(COLOUR))
    (tmp_path / "b.png").write_bytes(path.read_bytes()[:60])
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    kept = []
    for _ in range(5):
        kept.append(read_image(path))
        kept.append(read_mask(path))
        for reader in (read_image, read_mask):
            with pytest.raises(ImageError) as caught:
                reader(tmp_path / "b.png")
            kept.append(caught.value)
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16", "LA", "RGBA", "P"])
def test_masks(tmp_path: Path, mode: str) -> None:
    defect = np.zeros((9, 14), bool)
    defect[2:5, 3:9] = True
    values = defect.astype(np.uint8)  # a mask of ones counts as much as one of 255
    alpha = np.full_like(values, 255)  # an opaque mask is not a defect everywhere
    image = {
        "1": lambda: Image.fromarray(defect),
        "L": lambda: Image.fromarray(values),
        "RGB": lambda: Image.fromarray(np.dstack([values * 0, values, values * 0])),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16)),
        "LA": lambda: of_mode(np.dstack([values, alpha]), "LA"),
        "RGBA": lambda: of_mode(np.dstack([values, values, values, alpha]), "RGBA"),
        "P": lambda: of_mode(values, "P"),
    }[mode]()
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 0, 1])  # nearly black, and still not black
    found = read_mask(saved(tmp_path / "m.png", image))
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, defect)


@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_masks_are_turned_as_their_images_are(tmp_path: Path, orientation: int) -> None:
    values = np.zeros((9, 14), np.uint8)
    values[1:3, 2:9] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "m.png", Image.fromarray(values), exif=exif)
    np.testing.assert_array_equal(read_mask(path), read_image(path)[:, :, 0] > 127)
    np.testing.assert_array_equal(read_mask(path), UPRIGHT[orientation](values) > 127)


@given(levels=arrays(np.uint8, (4, 6)), wide=st.booleans())
def test_half_way_to_white_is_defective(tmp_path_factory: pytest.TempPathFactory, levels: Any, wide: bool) -> None:
    path = tmp_path_factory.mktemp("half") / "m.png"
    Image.fromarray(levels.astype(np.uint16) * 257 if wide else levels).save(path)
    np.testing.assert_array_equal(read_mask(path), levels != 0 if levels.max() < 128 else levels >= 128)


def test_coloured_palettes_are_labels_and_gray_ones_levels(tmp_path: Path) -> None:
    indices = (np.arange(12, dtype=np.uint8) % 3).reshape(3, 4)
    image = of_mode(indices, "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 64, 0])
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "a.png", image)), indices != 0)
    image.putpalette([0, 0, 0, 100, 100, 100, 255, 255, 255])
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "b.png", image)), indices == 2)


@settings(max_examples=30, deadline=None)
@given(levels=arrays(np.uint16, (3, 5)), white=st.integers(255, 65535))
def test_a_white_level_scales_every_frame_alike(
    tmp_path_factory: pytest.TempPathFactory, levels: Any, white: int
) -> None:
    path = tmp_path_factory.mktemp("white") / "a.png"
    Image.fromarray(levels).save(path)
    found = read_image(path, white)
    exact = np.minimum(levels * (255.0 / white), 255.0)
    assert np.abs(found[:, :, 0] - exact).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(found[:, :, 0], to_eight_bits(levels, white))


def test_a_white_level_reaches_every_page(tmp_path: Path) -> None:
    levels = [np.full((4, 5), level, np.uint16) for level in (0, 2048, 4095)]
    first, *others = [Image.fromarray(page) for page in levels]
    path = saved(tmp_path / "a.tif", first, save_all=True, append_images=others)
    assert [int(page[2][0, 0, 0]) for page in read_pages(path, 4095)] == [0, 128, 255]
    assert [int(page[2][0, 0, 0]) for page in read_pages(path)] == [0, 8, 16]


def test_a_white_level_leaves_eight_bit_files_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RAMP))
    check(read_image(path, 4095), three(RAMP))


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("write", [deep_png, deep_ppm])
def test_a_white_level_cannot_be_applied_to_deep_colour(tmp_path: Path, channels: int, write: Any) -> None:
    """Its lower bits are lost: 12 bits would become 4, and what a camera's array shows, a file would not."""
    if write is deep_ppm and channels != 3:
        pytest.skip("PPM is RGB")
    levels = np.full((4, 5, channels), 0x8000, np.uint16)
    path = write(tmp_path / f"a.{write.__name__[-3:]}", levels)
    assert set(read_image(path).ravel().tolist()) <= {127, 128}
    assert read_image(path, 65535).shape == (4, 5, 3)
    with pytest.raises(ImageError, match="white level of 4095 cannot be applied") as caught:
        read_image(path, 4095)
    assert "8 bits" in caught.value.cure
    with pytest.raises(ImageError, match="cannot be applied"):
        read_image_bytes(path.read_bytes(), "posted", 4095)


@pytest.mark.needs("cv2")
def test_a_tiff_of_deep_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert need("cv2").imwrite(str(path), np.full((4, 5, 3), 0x8000, np.uint16))
    with pytest.raises(ImageError, match="cannot be applied"):
        read_image(path, 4095)


@pytest.mark.parametrize("level", [0, 254, 65536, True, 4095.0, "4095"])
def test_white_levels_that_cannot_be(level: Any) -> None:
    with pytest.raises(ConfigError, match="white level"):
        check_white_level(level)


def test_suffixes_are_what_pillow_opens() -> None:
    Image.init()
    assert set(Image.registered_extensions()) >= IMAGE_SUFFIXES
