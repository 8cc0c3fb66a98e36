"""Which input a fit takes: the images' shape, tiles, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_models import TINY

from saae_train.config import FitConfig
from saae_train.data.category import Sample
from saae_train.fitting.backbone import _geometry

CONFIG = FitConfig(backbone=TINY, layers=(0, 1), input_size=(112, 112))


def one(folder: Path, size: tuple[int, int]) -> list[Sample]:
    file = folder / f"{size[0]}x{size[1]}.png"
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(file)
    return [Sample(file, "good", False, None)]


def geometry(folder: Path, size: tuple[int, int], **changes: object) -> tuple[object, object, list[str]]:
    said: list[str] = []
    window, tiles = _geometry(replace(CONFIG, **changes), one(folder, size), said.append)  # type: ignore[arg-type]
    return window, tiles, said


def test_a_window_has_the_shape_of_its_part_of_the_image(tmp_path: Path) -> None:
    window, tiles, said = geometry(tmp_path, (300, 600), tiles=(1, 2))
    assert (window, tiles) == ((112, 112), (1, 2))
    assert said == ["1 x 2 tiles of 112 x 112 pixels that overlap"]
    window, tiles, _ = geometry(tmp_path, (300, 600), tiles=(2, 2))
    assert window == (80, 160)


def test_as_many_tiles_as_the_images_want(tmp_path: Path) -> None:
    assert geometry(tmp_path, (500, 480), tiles=(0, 0))[1] == (2, 2)
    assert geometry(tmp_path, (120, 120), tiles=(0, 0))[1] == (1, 1)
    assert geometry(tmp_path, (120, 120))[2] == []


def test_large_images_are_told_of_tiles(tmp_path: Path) -> None:
    _, tiles, said = geometry(tmp_path, (500, 480))
    assert tiles == (1, 1)
    assert "--tiles 2x2 sees them larger, for 4 times the work" in said[-1]
    assert "stands for 4." in said[-1]


def test_a_size_that_was_asked_for_stays(tmp_path: Path) -> None:
    assert geometry(tmp_path, (300, 600), follow_shape=False, tiles=(1, 2))[:2] == ((112, 112), (1, 2))
