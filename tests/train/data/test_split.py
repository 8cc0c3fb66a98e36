"""The split of normal images: by content, disjoint, and for a fitted model what it was not fitted on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saae_runtime.errors import DataError
from saae_train.config import preset
from saae_train.data.category import Sample, find_category, from_folders
from saae_train.data.demo import write_demo
from saae_train.data.split import (
    MIN_FIT,
    MIN_HELD_OUT,
    content_digest,
    content_hashes,
    split_for,
    split_held_out,
    split_of,
)
from saae_train.record import FitRecord


def picture(path: Path, value: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Writes a small picture whose pixels depend on `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def normals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("normals")
    return from_folders(*{picture(folder / f"{i:02d}.png", i, (34, 34)).parent for i in range(40)}).train


@settings(max_examples=60, deadline=None)
@given(data=st.data(), fraction=st.floats(0.01, 0.99), minimum=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_split_is_a_partition_that_ignores_order(
    normals: tuple[Sample, ...], data: st.DataObject, fraction: float, minimum: int, seed: int
) -> None:
    count = data.draw(st.integers(MIN_FIT + MIN_HELD_OUT, len(normals)))
    chosen = normals[:count]
    fit, held_out = split_held_out(chosen, fraction, minimum, seed)
    assert sorted(fit + held_out, key=lambda s: s.path) == list(chosen)
    assert len(fit) >= MIN_FIT
    assert len(held_out) >= MIN_HELD_OUT
    assert split_held_out(data.draw(st.permutations(chosen)), fraction, minimum, seed) == (fit, held_out)


def test_split_survives_renaming_and_changes_with_the_seed(normals: tuple[Sample, ...], tmp_path: Path) -> None:
    fit, held_out = split_held_out(normals)
    assert len(held_out) == 6
    renamed = [
        Sample(Path(shutil.copy(s.path, tmp_path / f"{97 * i % 89:02d}x.png")), "good", None, False)
        for i, s in enumerate(normals)
    ]
    fit_2, held_out_2 = split_held_out(renamed)
    assert [s.path.read_bytes() for s in held_out] == [s.path.read_bytes() for s in held_out_2]
    assert content_digest(fit) == content_digest(fit_2)
    assert {s.path for s in split_held_out(normals, seed=1)[1]} != {s.path for s in held_out}


def test_copies_fall_on_one_side(normals: tuple[Sample, ...], tmp_path: Path) -> None:
    copies = [
        Sample(Path(shutil.copy(s.path, tmp_path / f"copy{i}.png")), "good", None, False)
        for i, s in enumerate(normals[:10])
    ]
    for seed in range(5):
        fit, held_out = split_held_out([*normals[:10], *copies], 0.3, seed=seed)
        assert not {s.path.read_bytes() for s in fit} & {s.path.read_bytes() for s in held_out}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_images(normals: tuple[Sample, ...], count: int) -> None:
    with pytest.raises(DataError, match="at least 6") as caught:
        split_held_out(normals[:count])
    assert caught.value.what.startswith(f"{count} normal image")
    assert "thresholds" in caught.value.why


def test_copies_do_not_count_as_images(normals: tuple[Sample, ...], tmp_path: Path) -> None:
    copies = [Sample(Path(shutil.copy(normals[0].path, tmp_path / f"{i}.png")), "good", None, False) for i in range(9)]
    with pytest.raises(DataError, match="1 normal image is too few") as caught:
        split_held_out(copies)
    assert "9 files" in caught.value.what


@pytest.mark.parametrize("fraction", [1.0, -0.1, -1.0, float("nan")])
def test_impossible_share(normals: tuple[Sample, ...], fraction: float) -> None:
    with pytest.raises(DataError, match="cannot be held out"):
        split_held_out(normals, fraction)


def test_without_a_share_every_image_is_fitted_once(normals: tuple[Sample, ...], tmp_path: Path) -> None:
    copy = Sample(Path(shutil.copy(normals[0].path, tmp_path / "copy.png")), "good", None, False)
    fitting, held_out = split_held_out([*normals[::-1], copy], 0.0)
    assert held_out == ()
    assert len(fitting) == len(normals)
    assert list(fitting) == sorted(fitting, key=lambda sample: sample.path.as_posix())
    assert len({sample.path.read_bytes() for sample in fitting}) == len(normals)


def test_digest_tells_content_order_label_and_mask_apart(normals: tuple[Sample, ...], tmp_path: Path) -> None:
    a, b = normals[:2]
    moved = Sample(Path(shutil.copy(a.path, tmp_path / "elsewhere.png")), "good", None, False)
    assert content_digest([a, b]) == content_digest([moved, b])
    bad = Sample(a.path, "bent", None, True)
    masked = Sample(a.path, "bent", picture(tmp_path / "m.png", 9), True)
    lists = ([a, b], [b, a], [a], [], [bad, b], [masked, b])
    assert len({content_digest(samples) for samples in lists}) == len(lists)


def test_digest_and_pixels_follow_the_white_level(tmp_path: Path) -> None:
    levels = np.arange(0, 4080, 17, dtype=np.uint16).reshape(15, 16)
    for i in range(2):
        path = tmp_path / f"ok/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(levels + i).save(path)
    category = from_folders(tmp_path / "ok")
    twelve = category.with_white_level(4095)
    assert content_digest(twelve.train) != content_digest(category.train)
    assert category.with_white_level(None) is category
    assert category.train[0].read().max() == 16
    assert twelve.train[0].read().max() == 253


def test_digest_sees_a_file_change(tmp_path: Path) -> None:
    sample = Sample(picture(tmp_path / "a.png", 1), "good", None, False)
    before = content_digest([sample])
    picture(tmp_path / "a.png", 2)
    assert content_digest([sample]) != before
    sample.path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        content_digest([sample])


def test_the_split_of_a_fitted_model_goes_by_content(tmp_path: Path) -> None:
    write_demo(tmp_path, "weave", size=(64, 64), train=9, test_good=1, per_defect=1)
    category = find_category(tmp_path, "weave")
    config = preset("fast").replace(score="cosine")
    split = split_for(config, category)
    assert split_of(FitRecord(fitted_on=content_hashes(split.fitting)), config, category) == split
    everything = split_of(FitRecord(fitted_on=content_hashes(category.train)), config, category)
    assert not everything.unseen
    assert "FITTED ON" in everything.note


def test_a_model_with_a_memory_holds_nothing_out(tmp_path: Path) -> None:
    write_demo(tmp_path, "weave", size=(64, 64), train=9, test_good=1, per_defect=1)
    category = find_category(tmp_path, "weave")
    config = preset("fast")
    split = split_for(config, category)
    assert (split.fitting, split.held_out, split.normal) == (category.train, (), category.train)
    assert split_of(FitRecord(fitted_on=content_hashes(category.train)), config, category) == split


def test_images_are_fitted_in_the_order_in_which_they_were_taken(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 11, 100):
        picture(tmp_path / f"frame_{number}.png", number)
    split = split_for(preset("fast"), from_folders(tmp_path))
    assert [sample.path.stem[6:] for sample in split.fitting] == ["1", "2", "9", "10", "11", "100"]


def test_a_picture_under_other_bytes_counts_once(tmp_path: Path) -> None:
    """A second folder with the same pictures as JPEG would stay in the memory when the first is left out of it."""
    good, again = tmp_path / "good", tmp_path / "again"
    rng = np.random.default_rng(0)
    again.mkdir()
    for index in range(8):
        path = picture(good / f"{index}.png", index)
        pixels = np.kron(rng.uniform(0, 255, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        Image.fromarray(pixels).save(again / f"{index}.jpg", quality=95)
    category = from_folders(good)
    category = dataclasses.replace(category, train=(*category.train, *from_folders(again).train))
    split = split_for(preset("fast"), category)
    assert [sample.path for sample in split.fitting] == sorted(again.iterdir())  # the first by path
    assert split.note == "not used, because another file shows the same picture: 0.png, 1.png, 2.png and 5 more"
    for seed in range(5):
        fitting, held_out = split_held_out(category.train, 0.3, seed=seed)
        assert len(fitting) + len(held_out) == 16
        assert {sample.path.stem for sample in fitting}.isdisjoint(sample.path.stem for sample in held_out)
