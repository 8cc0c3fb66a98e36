"""The drawn categories: what they show, that masks are what changed, and that sets appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.images import read_image, read_mask
from saae_train.data.category import SYNTHETIC_STAMP, find_category
from saae_train.data.check import check
from saae_train.data.demo import DEMO_CATEGORIES, defect_types, render, write, write_demo
from saae_train.data.demo.canvas import NOISE_SIGMA, change_mask

SMALL: dict[str, Any] = {"size": (64, 80), "train": 3, "test_good": 2, "per_defect": 1}
QUICK: dict[str, Any] = {**SMALL, "category": "weave", "train": 2, "test_good": 1}
"""Half as long to draw, for tests of what is written and when: each picture takes as long as one of 512 pixels."""
CASES = [(category, defect) for category in DEMO_CATEGORIES for defect in defect_types(category)]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_zipper_has_the_defects_of_mvtec_ad() -> None:
    assert DEMO_CATEGORIES == ("weave", "zipper")
    assert defect_types("zipper") == (
        "broken_teeth",
        "combined",
        "fabric_border",
        "fabric_interior",
        "rough",
        "split_teeth",
        "squeezed_teeth",
    )


@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_good_pictures_are_alike_but_never_equal(category: str) -> None:
    pictures = [render(category, (256, 256), 0, 0, i)[0].astype(float) for i in range(4)]
    again, mask = render(category, (256, 256), 0, 0, 0)
    assert np.array_equal(again, pictures[0])
    assert again.dtype == np.uint8
    assert not mask.any()
    for i in range(4):
        assert 40 < pictures[i].mean() < 200
        for j in range(i):
            difference = np.abs(pictures[i] - pictures[j])
            assert difference.mean() > 3 * NOISE_SIGMA
            # Blurred until texture and pose vanish, the same product remains.
            far = [ndimage.gaussian_filter(p, (24, 24, 0)[: p.ndim]) for p in (pictures[i], pictures[j])]
            assert np.abs(far[0] - far[1]).mean() < 14


def test_a_zipper_is_a_zipper() -> None:
    """Bright table left and right, dark cloth, and a chain of teeth with the pitch that it should have."""
    picture = render("zipper", (512, 512), 7, 0, 0)[0].astype(float)
    columns = picture.mean(axis=0)
    assert columns[:60].mean() > 150
    assert columns[-60:].mean() > 150
    assert columns[120:210].mean() < 80
    chain = picture[:, 226:252].mean(axis=1)
    spectrum = np.abs(np.fft.rfft((chain - chain.mean()) * np.hanning(512), 8192))
    pitch = 8192 / (int(np.argmax(spectrum[100:])) + 100)
    assert pitch == pytest.approx(19.0, rel=0.04)


@pytest.mark.parametrize(("category", "defect"), CASES)
def test_masks_are_what_changed(category: str, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undamaged = dataclasses.replace(write._KINDS[category], damage=lambda rng, scene, name: scene)
    for index in range(3):
        bad, mask = render(category, (384, 384), 11, index, defect=defect)
        assert mask.dtype == np.bool_
        assert mask.shape == (384, 384)
        assert 30 <= mask.sum() < 0.25 * mask.size
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        assert np.bincount(labels.ravel())[1:].min() >= 12
        # The same picture, noise included, drawn with damage that does nothing.
        with monkeypatch.context() as patched:
            patched.setitem(write._KINDS, category, undamaged)
            patched.setattr(write, "change_mask", lambda clean, damaged: np.ones(clean.shape[:2], bool))
            good, _ = render(category, (384, 384), 11, index, defect=defect)
        change = np.abs(bad.astype(float) - good.astype(float))
        change = change.max(axis=2) if change.ndim == 3 else change
        assert change[mask].mean() > 3 * NOISE_SIGMA
        outside = ~ndimage.binary_dilation(mask, iterations=1)
        assert change[outside].mean() < 0.5
        assert np.percentile(change[outside], 99.9) <= 3 * NOISE_SIGMA + 2


def test_change_mask_fills_pinholes_and_drops_specks() -> None:
    clean = np.full((60, 60), 100.0, np.float32)
    damaged = clean.copy()
    damaged[10:30, 10:30] += 50
    damaged[20, 20] = 100
    damaged[50, 50] = 0
    damaged[0:6, 50:60] += 50
    expected = np.zeros((60, 60), bool)
    expected[10:30, 10:30] = True
    expected[0:6, 50:60] = True
    assert np.array_equal(change_mask(clean, damaged), expected)
    assert not change_mask(clean, clean + np.float32(NOISE_SIGMA)).any()
    colour = np.repeat(clean[..., None], 3, axis=2)
    stained = colour.copy()
    stained[10:30, 10:30, 2] -= 40
    assert change_mask(colour, stained).sum() == 400


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(64, 400),
    width=st.integers(64, 400),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**31),
)
def test_any_size(height: int, width: int, case: tuple[str, str], seed: int) -> None:
    picture, mask = render(case[0], (height, width), seed, defect=case[1])
    assert picture.shape[:2] == mask.shape == (height, width)
    assert mask.any()


@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_a_set_is_a_valid_tree_and_marked_synthetic(tmp_path: Path, category: str) -> None:
    steps: list[tuple[int, int]] = []
    drawn = write_demo(tmp_path, category, **SMALL, progress=lambda done, total: steps.append((done, total)))
    total = 5 + len(defect_types(category))
    assert steps == [(i, total) for i in range(1, total + 1)]
    assert drawn == find_category(tmp_path, category)
    assert drawn.synthetic
    assert (len(drawn.train), len(drawn.test)) == (3, total - 3)
    assert drawn.defect_types == defect_types(category)
    report = check(drawn)
    assert report.ok
    assert report.warnings == ()
    for sample in drawn.test:
        assert read_image(sample.path).shape == (64, 80, 3)
        if sample.is_anomalous:
            assert sample.mask is not None
            assert read_mask(sample.mask).any()


def test_same_seed_same_files_other_seed_other_files(tmp_path: Path) -> None:
    one = files(write_demo(tmp_path / "a", **SMALL).root)
    two = files(write_demo(tmp_path / "b", **SMALL).root)
    assert one == two
    other = files(write_demo(tmp_path / "c", **SMALL, seed=1).root)
    assert set(other) == set(one)
    assert all(other[name] != one[name] for name in one if "mask" not in name)


def test_more_pictures_do_not_change_the_first(tmp_path: Path) -> None:
    few = files(write_demo(tmp_path / "a", **QUICK).root)
    many = files(write_demo(tmp_path / "b", **{**QUICK, "train": 3, "per_defect": 2}).root)
    assert {name: many[name] for name in few if name.endswith(".png")} == {
        name: data for name, data in few.items() if name.endswith(".png")
    }


def test_a_complete_set_is_reused_and_a_spoilt_one_redrawn(tmp_path: Path) -> None:
    root = write_demo(tmp_path, **QUICK).root
    before = files(root)
    drawn: list[int] = []

    def count(done: int, total: int) -> None:
        drawn.append(done)

    write_demo(tmp_path, **QUICK, progress=count)
    assert drawn == []
    for spoil in (
        lambda: (root / "train/good/000.png").write_bytes(b"x"),
        lambda: (root / "test/good/000.png").unlink(),
        lambda: shutil.rmtree(root / "ground_truth"),
    ):
        spoil()
        write_demo(tmp_path, **QUICK, progress=count)
        assert drawn, spoil
        assert files(root) == before
        drawn.clear()
    assert len(write_demo(tmp_path, **{**QUICK, "train": 1}).train) == 1


@pytest.mark.parametrize("stamp", [None, "not json", "{}", "[1]", '{"files": 3, "parameters": {}}'])
def test_foreign_folders_are_never_touched(tmp_path: Path, stamp: str | None) -> None:
    mine = tmp_path / "zipper/train/good/mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    if stamp is not None:
        (tmp_path / "zipper" / SYNTHETIC_STAMP).write_text(stamp)
    before = files(tmp_path)
    with pytest.raises(DataError, match="not drawn by saae"):
        write_demo(tmp_path, **SMALL)
    assert files(tmp_path) == before


def test_files_added_to_a_drawn_set_are_kept(tmp_path: Path) -> None:
    root = write_demo(tmp_path, **QUICK).root
    (root / "test/good/mine.png").write_bytes(b"precious")
    before = files(root)
    with pytest.raises(DataError, match="files were added"):
        write_demo(tmp_path, **QUICK, seed=5)
    assert files(root) == before


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    if existing:
        write_demo(tmp_path, **QUICK)
    before = files(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path, **{**QUICK, "seed": 9}, progress=interrupt)
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["weave"] if existing else [])


def test_the_stamp_says_what_was_drawn(tmp_path: Path) -> None:
    root = write_demo(tmp_path, "weave", **SMALL, seed=3).root
    stamp = json.loads((root / SYNTHETIC_STAMP).read_text())
    assert stamp["synthetic"] is True
    assert stamp["parameters"]["seed"] == 3
    assert set(stamp["files"]) == set(files(root)) - {SYNTHETIC_STAMP}


@pytest.mark.parametrize(
    "arguments",
    [
        {"category": "button"},
        {"size": (63, 512)},
        {"size": (512, 9000)},
        {"train": 0},
        {"test_good": -1},
        {"per_defect": -1},
        {"seed": -1},
    ],
)
def test_impossible_wishes(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        write_demo(tmp_path, **arguments)
    assert caught.value.cure
    assert list(tmp_path.iterdir()) == []


def test_unknown_defect() -> None:
    with pytest.raises(ConfigError, match="no defect type 'hole'"):
        render("zipper", (64, 64), 0, defect="hole")
