"""Listing of the MVTec AD tree and of plain folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saae_runtime.errors import DataError
from saae_runtime.sources.folders import images_below
from saae_train.data.category import (
    distinct_names,
    find_category,
    from_folders,
    list_categories,
)


def picture(path: Path, value: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Writes a small picture whose pixels depend on `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (40, 48)) -> Path:
    """Writes a mask with one defective block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, np.uint8)
    pixels[5:12, 5:12] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An MVTec AD tree with the category `nut`: 8 training, 2 + 3 test images of various sizes."""
    root = tmp_path / "data"
    for i in range(8):
        picture(root / f"nut/train/good/{i:03d}.png", i, (40 + i, 48))
    for i in range(2):
        picture(root / f"nut/test/good/{i:03d}.png", 100 + i)
    for i in range(2):
        picture(root / f"nut/test/bent/{i:03d}.png", 200 + i)
        mask(root / f"nut/ground_truth/bent/{i:03d}_mask.png")
    picture(root / "nut/test/scratch/000.jpg", 300)
    mask(root / "nut/ground_truth/scratch/000.png")
    return root


def test_tree_is_listed_in_a_fixed_order(tree: Path) -> None:
    category = find_category(tree, "nut")
    assert [s.path.name for s in category.train] == [f"{i:03d}.png" for i in range(8)]
    assert [(s.label, s.is_anomalous) for s in category.test] == [
        ("good", False),
        ("good", False),
        ("bent", True),
        ("bent", True),
        ("scratch", True),
    ]
    masks = [s.mask.relative_to(tree / "nut/ground_truth").as_posix() if s.mask else None for s in category.test]
    assert masks == [None, None, "bent/000_mask.png", "bent/001_mask.png", "scratch/000.png"]
    assert category.defect_types == ("bent", "scratch")
    assert category.has_masks
    assert not category.synthetic
    assert category.findings == ()
    assert find_category(tree / "nut", "nut") == category


def test_the_category_folder_itself_is_taken(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "nut")
    assert len(find_category(".", "nut").train) == 8
    with pytest.raises(DataError, match="no category 'bolt'"):
        find_category(".", "bolt")


def test_missing_category_names_what_is_near_and_what_is_there(tree: Path) -> None:
    picture(tree / "bottle/train/good/0.png", 1)
    with pytest.raises(DataError) as caught:
        find_category(tree, "botle")
    assert "bottle" in caught.value.cure
    assert "bottle, nut" in caught.value.why
    assert "nut" not in caught.value.cure


def test_missing_root_and_root_without_categories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data folder"):
        list_categories(tmp_path / "none")
    with pytest.raises(DataError, match="no category"):
        find_category(tmp_path, "nut")


@pytest.mark.parametrize("state", ["empty", "missing", "other files"])
def test_no_training_images(tree: Path, state: str) -> None:
    good = tree / "nut/train/good"
    shutil.rmtree(good)
    if state != "missing":
        good.mkdir()
    if state == "other files":
        (good / "clip.mov").write_text("x")
    with pytest.raises(DataError) as caught:
        find_category(tree, "nut")
    assert str(good) in caught.value.what
    assert ("missing" if state == "missing" else "holds no images") in caught.value.what
    assert (str(good / "clip.mov") in "".join(caught.value.problems)) == (state == "other files")


def test_strays_orphans_and_missing_masks_are_found(tree: Path) -> None:
    nut = tree / "nut"
    (nut / "train/good/old.gif").write_text("x")
    (nut / "train/good/.hidden").write_text("x")
    (nut / "train/good/Thumbs.db").write_text("x")
    picture(nut / "train/rejects/0.png", 5)
    (nut / "ground_truth/bent/001_mask.png").unlink()
    mask(nut / "ground_truth/bent/007_mask.png")
    mask(nut / "ground_truth/dent/000_mask.png")
    (nut / "test/loose.png").write_bytes(b"x")
    found = {f.path.relative_to(nut).as_posix(): f.what for f in find_category(tree, "nut").findings}
    assert set(found) == {
        "train/good/old.gif",
        "train/rejects",
        "test/bent/001.png",
        "ground_truth/bent/007_mask.png",
        "ground_truth/dent",
        "test/loose.png",
    }
    assert "has no mask" in found["test/bent/001.png"]
    assert "without an image" in found["ground_truth/bent/007_mask.png"]


def test_a_tree_without_any_masks_is_no_finding(tree: Path) -> None:
    shutil.rmtree(tree / "nut/ground_truth")
    category = find_category(tree, "nut")
    assert category.findings == ()
    assert not category.has_masks


def test_free_folders(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"ok/day{i % 2}/{i}.png", i)
    picture(tmp_path / "ok2/9.png", 9)
    picture(tmp_path / "bad/0.png", 20)
    picture(tmp_path / "bad/crack/1.png", 21)
    mask(tmp_path / "truth/0.png")
    mask(tmp_path / "truth/crack/1_mask.png")
    category = from_folders(
        tmp_path / "ok", tmp_path / "bad", tmp_path / "truth", name="nut", normal_test=tmp_path / "ok2"
    )
    assert category.name == "nut"
    assert [s.path.name for s in category.train] == ["0.png", "2.png", "1.png"]
    assert [(s.label, s.mask is not None) for s in category.test] == [
        ("good", False),
        ("defect", True),
        ("crack", True),
    ]
    assert category.findings == ()
    alone = from_folders(tmp_path / "ok")
    assert alone.name == "ok"
    assert alone.test == ()


def test_free_folders_that_cannot_be_used(tmp_path: Path) -> None:
    picture(tmp_path / "ok/0.png", 0)
    (tmp_path / "void").mkdir()
    for arguments in (
        {"normal": tmp_path / "gone"},
        {"normal": tmp_path / "void"},
        {"normal": tmp_path / "ok/0.png"},
        {"normal": tmp_path / "ok", "abnormal": tmp_path / "void"},
        {"normal": tmp_path / "ok", "normal_test": tmp_path / "void"},
        {"normal": tmp_path / "ok", "masks": tmp_path / "void"},
    ):
        with pytest.raises(DataError):
            from_folders(**arguments)


@pytest.mark.parametrize("name", ["good", "OK", "normal"])
def test_good_images_among_the_defective_ones_are_good(tmp_path: Path, name: str) -> None:
    """As in the test folder of an MVTec tree, given whole: as defects they would count as misses."""
    picture(tmp_path / "ok/0.png", 0)
    picture(tmp_path / "test/crack/0.png", 1)
    picture(tmp_path / f"test/{name}/0.png", 2)
    found = from_folders(tmp_path / "ok", tmp_path / "test").test
    assert [(sample.path.parent.name, sample.label, sample.is_anomalous) for sample in found] == [
        (name, "good", False),
        ("crack", "crack", True),
    ]


def test_several_free_folders_are_all_used(tmp_path: Path) -> None:
    for number, shift in enumerate(("day", "night")):
        picture(tmp_path / f"{shift}/ok/0.png", 10 * number)
        picture(tmp_path / f"{shift}/bad/0.png", 10 * number + 1)
        picture(tmp_path / f"{shift}/bad/crack/1.png", 10 * number + 2)
        mask(tmp_path / f"{shift}/truth/0.png")
        mask(tmp_path / f"{shift}/truth/crack/1.png")

    def both(name: str) -> list[Path]:
        return [tmp_path / "day" / name, tmp_path / "night" / name]

    category = from_folders(both("ok"), both("bad"), both("truth"))
    assert [sample.path for sample in category.train] == [tmp_path / "day/ok/0.png", tmp_path / "night/ok/0.png"]
    assert [(s.path.parts[-3:], s.label) for s in category.test if s.label == "crack"] == [
        (("bad", "crack", "1.png"), "crack")
    ] * 2
    # Each with the mask from beside it, though the names are the same.
    for sample in category.test:
        assert sample.mask is not None
        assert sample.mask.relative_to(tmp_path).parts[0] == sample.path.relative_to(tmp_path).parts[0]
    assert len({sample.path for sample in category.test}) == 4
    assert category.findings == ()
    assert category.root == tmp_path
    assert category.name == tmp_path.name
    assert from_folders(both("ok"), name="nut").name == "nut"
    more = from_folders(tmp_path / "day/ok", normal_test=[tmp_path / "night/ok", tmp_path / "night/bad"])
    assert [sample.label for sample in more.test] == ["good"] * 3


def test_folders_that_do_not_go_together(tmp_path: Path) -> None:
    for name in ("ok/0.png", "ok/new/1.png", "bad/0.png", "worse/0.png"):
        picture(tmp_path / name, 0)
    mask(tmp_path / "truth/0.png")
    (tmp_path / "void").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "ok")
    ok, bad = tmp_path / "ok", [tmp_path / "bad", tmp_path / "worse"]
    for normal, message in (
        ([ok, ok], "given twice"),
        ([ok, tmp_path / "alias"], "given twice"),
        ([ok / "new", ok], "ok/new lies in"),
        ([ok, ok / "new"], "ok/new lies in"),
        ([ok, tmp_path / "void"], "holds no images"),
        ([ok, tmp_path / "gone"], "is missing"),
    ):
        with pytest.raises(DataError, match=message):
            from_folders(normal)
    with pytest.raises(DataError, match="2 folders of defective images, and 1 of masks") as caught:
        from_folders(ok, bad, tmp_path / "truth")
    assert "--masks" in caught.value.cure


def test_names_are_kept_apart_by_the_folders_before_them() -> None:
    paths = [Path("a/day/1.png"), Path("a/night/1.png"), Path("a/night/2.png"), Path("b/night/1.png")]
    assert distinct_names(paths) == ["day/1.png", "a/night/1.png", "2.png", "b/night/1.png"]
    assert distinct_names(paths[:1]) == ["1.png"]
    assert distinct_names([]) == []
    assert distinct_names([Path("1.png")] * 2) == ["1.png"] * 2  # one file twice cannot be told apart


def test_folders_and_links_are_read_by_the_rule_of_the_runtime(tmp_path: Path) -> None:
    for name in ("good/a.png", "good/deep/b.png", "elsewhere/c.png", "other/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "good" / "deep" / "up").symlink_to("..")
    (tmp_path / "good" / "above").symlink_to("../..")
    (tmp_path / "good" / "linked").symlink_to("../elsewhere")
    (tmp_path / "good" / "deep" / "again").symlink_to("../../elsewhere")
    found = [sample.path for sample in from_folders(tmp_path / "good").train]
    assert found == sorted(images_below(tmp_path / "good", recursive=True))
    assert sorted(path.name for path in found) == ["a.png", "b.png", "c.png"]
