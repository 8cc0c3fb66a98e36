"""Damaged and hostile image files: each is an image or a named error, whatever its bytes are.

500 files in the suite; `python -m pytest tests/attack -m fuzz -s` tries 10,000 and prints what became of them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saae_runtime.errors import ImageError
from saae_runtime.images import read_mask, read_pages

SMALL = 400_000  # pixels: what a few kilobytes may become here


def seeds() -> list[bytes]:
    """Whole files of every kind that is read, and of some that are not."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    gray, deep = colour.convert("L"), Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16))
    more = [colour.rotate(180), gray.convert("RGB")]
    many = {"save_all": True, "append_images": more}
    kinds = [
        (colour, "PNG", {}),
        (deep, "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (colour, "PNG", many),
        (colour, "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "BMP", {}),
        (colour, "TIFF", many),
        (deep, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (colour, "WEBP", {}),
        (colour, "WEBP", {**many, "lossless": True}),
        (gray, "PPM", {}),
        (colour, "GIF", {}),
        (colour, "EPS", {}),
    ]
    found = []
    for image, kind, options in kinds:
        buffer = BytesIO()
        image.save(buffer, format=kind, **options)
        found.append(buffer.getvalue())
    return found


def spoil(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of: bytes changed, cut off, doubled, a piece of another file inside, numbers made extreme."""
    spoiled = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(0, max(len(spoiled), 1)))
        how = int(rng.integers(0, 6))
        if how == 0:
            for at in rng.integers(0, max(len(spoiled), 1), 8):
                if len(spoiled) > at:
                    spoiled[at] ^= 1 << int(rng.integers(0, 8))
        elif how == 1:
            del spoiled[place:]
        elif how == 2:
            spoiled[place:place] = spoiled[: int(rng.integers(0, 200))]
        elif how == 3:
            other = others[int(rng.integers(0, len(others)))]
            spoiled[place : place + 40] = other[place : place + 40]
        elif how == 4:
            place = int(rng.integers(0, min(len(spoiled), 64) + 1))  # headers hold the sizes
            spoiled[place : place + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"][
                int(rng.integers(0, 4))
            ]
        else:
            del spoiled[place : place + int(rng.integers(1, 30))]
    return bytes(spoiled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("files", [500, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_an_image_or_a_named_error(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAAE_MAX_PIXELS", str(SMALL))
    whole, rng, became, violations = seeds(), np.random.default_rng(7), Counter[str](), []
    path = tmp_path / "x.png"
    for number in range(files):
        data = spoil(whole[number % len(whole)], whole, rng)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for _, count, page in read_pages(path):
                    if isinstance(page, ImageError):
                        became["error of a page"] += 1
                        assert page.what
                        assert page.cure
                        continue
                    became["image" if count == 1 else "page"] += 1
                    assert page.dtype == np.uint8
                    assert page.ndim == 3
                    assert page.shape[2] == 3
                    assert page.shape[0] * page.shape[1] <= SMALL
                read_mask(path)
            except ImageError as error:
                became["named error"] += 1
                if not error.what.startswith(str(path)) or not error.cure:
                    violations.append(f"an error without a name or a cure: {error}")
            except Exception as error:  # counted, to show all of them
                violations.append(f"{type(error).__name__}: {error} (input {number}: {data[:60]!r})")
    print(f"{files} image files: {dict(became)}, {len(violations)} violations")
    assert violations == []
    assert became["named error"] > files // 10
    assert became["image"] > files // 50
