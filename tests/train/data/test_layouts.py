"""Published data sets are read in the trees that they come in, and masks under the names that people give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saae_train.data.category import Category, find_category, from_folders, list_categories
from saae_train.data.check import check


def picture(path: Path) -> None:
    """A picture of 40 x 48 that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.as_posix().encode()))
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)


def mask(path: Path, row: int | None = 5) -> None:
    """A mask with a block of 4 x 7 from `row` on; None marks nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((40, 48), np.uint8)
    if row is not None:
        pixels[row : row + 4, 5:12] = 255
    Image.fromarray(pixels).save(path)


def read(root: Path, name: str, layout: str) -> Category:
    """The category, listed by its name and usable as it is."""
    assert name in list_categories(root)
    category = find_category(root, name)
    assert category.layout.partition(":")[0] == layout
    report = check(category)
    assert report.problems == ()
    assert find_category(root / name, name) == category
    return category


def counts(category: Category) -> tuple[int, int, int]:
    """Normal for training, normal for testing, defective."""
    bad = sum(sample.is_anomalous for sample in category.test)
    return len(category.train), len(category.test) - bad, bad


def test_mvtec_ad(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"nut/train/good/{i:03d}.png")
    picture(tmp_path / "nut/test/good/000.png")
    picture(tmp_path / "nut/test/bent/000.png")
    mask(tmp_path / "nut/ground_truth/bent/000_mask.png")
    for name in ("license.txt", "readme.txt"):
        (tmp_path / "nut" / name).write_text("x")
    assert counts(read(tmp_path, "nut", "MVTec AD")) == (4, 1, 1)


def test_mvtec_loco_has_several_masks_an_image(tmp_path: Path) -> None:
    box = tmp_path / "box"
    for i in range(3):
        picture(box / f"train/good/{i:03d}.png")
        picture(box / f"validation/good/{i:03d}.png")
    picture(box / "test/good/000.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        for i in range(2):
            picture(box / f"test/{kind}/{i:03d}.png")
            mask(box / f"ground_truth/{kind}/{i:03d}/000.png")
    mask(box / "ground_truth/logical_anomalies/001/001.png", row=20)
    (box / "defects_config.json").write_text("[]")
    category = read(tmp_path, "box", "MVTec LOCO AD")
    assert counts(category) == (6, 1, 4)
    assert "validation" in category.layout
    truths = [sample.truth() for sample in category.test if sample.is_anomalous]
    assert [int(truth.sum()) for truth in truths if truth is not None] == [28, 56, 28, 28]


def test_mvtec_ad_2(tmp_path: Path) -> None:
    can = tmp_path / "can"
    picture(can / "train/good/000_regular.png")
    picture(can / "validation/good/000_regular.png")
    picture(can / "test_public/good/000_regular.png")
    picture(can / "test_public/bad/000_overexposed.png")
    mask(can / "test_public/ground_truth/bad/000_overexposed_mask.png")
    picture(can / "test_private/000_regular.png")
    picture(can / "test_private_mixed/000_mixed.png")
    category = read(tmp_path, "can", "MVTec AD 2")
    assert counts(category) == (2, 1, 1)
    assert category.has_masks
    assert "private" in category.layout


@pytest.mark.parametrize("table", [True, False])
def test_visa(tmp_path: Path, table: bool) -> None:
    data = tmp_path / "candle/Data"
    lines = ["object,split,label,image,mask"]
    for i in range(10):
        picture(data / f"Images/Normal/{i:04d}.JPG")
        split = "test" if i in (0, 7, 8) else "train"
        lines.append(f"candle,{split},normal,candle/Data/Images/Normal/{i:04d}.JPG,")
    for i in range(3):
        picture(data / f"Images/Anomaly/{i:03d}.JPG")
        mask(data / f"Masks/Anomaly/{i:03d}.png")
    (tmp_path / "candle/image_anno.csv").write_text("image,label,mask")
    if table:
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    category = read(tmp_path, "candle", "VisA")
    assert list_categories(tmp_path) == ["candle"]
    assert counts(category) == ((7, 3, 3) if table else (8, 2, 3))
    names = [sample.path.stem for sample in category.test if not sample.is_anomalous]
    assert names == (["0000", "0007", "0008"] if table else ["0004", "0009"])
    assert category.has_masks


def test_btad(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"03/train/ok/{i:04d}.bmp")
        picture(tmp_path / f"03/test/ok/{i:04d}.bmp")
        picture(tmp_path / f"03/test/ko/{i:04d}.bmp")
        mask(tmp_path / f"03/ground_truth/ko/{i:04d}.png")
    category = read(tmp_path, "03", "BTAD")
    assert counts(category) == (3, 3, 3)
    assert category.defect_types == ("ko",)
    assert all(sample.mask is not None for sample in category.test if sample.is_anomalous)


def test_kolektor_sdd_is_split_by_parts(tmp_path: Path) -> None:
    root = tmp_path / "KolektorSDD"
    for part in range(1, 11):
        for i in range(3):
            picture(root / f"kos{part:02d}/Part{i}.jpg")
            mask(root / f"kos{part:02d}/Part{i}_label.bmp", row=5 if i == 1 else None)
    category = read(tmp_path, "KolektorSDD", "KolektorSDD")
    assert counts(category) == (16, 4, 10)
    assert {s.path.parent.name for s in category.test if not s.is_anomalous} == {"kos05", "kos10"}
    assert not {s.path for s in category.train} & {s.path for s in category.test}


def test_kolektor_sdd_2_has_masks_beside_its_images(tmp_path: Path) -> None:
    root = tmp_path / "KolektorSDD2"
    for split in ("train", "test"):
        for i in range(4):
            picture(root / f"{split}/{i}.png")
            mask(root / f"{split}/{i}_GT.png", row=5 if i == 3 else None)
    category = read(tmp_path, "KolektorSDD2", "KolektorSDD2")
    assert counts(category) == (3, 3, 1)
    assert "1 defective images of train are left out" in category.layout


@pytest.mark.parametrize("good", ["Good", "OK", "normal"])
def test_good_under_other_names(tmp_path: Path, good: str) -> None:
    picture(tmp_path / f"nut/train/{good}/0.png")
    picture(tmp_path / f"nut/test/{good}/0.png")
    mask(tmp_path / f"nut/ground_truth/{good}/0.png", row=None)
    category = find_category(tmp_path, "nut")
    assert counts(category) == (1, 1, 0)
    assert category.findings == ()
    assert {sample.label for sample in category.test} == {"good"}


@pytest.mark.parametrize(
    "name", ["7", "7_mask", "7_GT", "7_gt", "7_seg", "7_label", "7-Mask", "7_mask_0", "7_0_mask", "7/0"]
)
@pytest.mark.parametrize("place", ["ground_truth/bent", "ground_truth"])
def test_names_of_masks(tmp_path: Path, name: str, place: str) -> None:
    picture(tmp_path / "nut/train/good/0.png")
    picture(tmp_path / "nut/test/bent/7.png")
    mask(tmp_path / "nut" / place / f"{name}.png")
    category = find_category(tmp_path, "nut")
    assert category.findings == ()
    (sample,) = category.test
    assert sample.masks == (tmp_path / "nut" / place / f"{name}.png",)


def test_a_number_behind_a_name_is_an_image_of_its_own_where_there_is_one(tmp_path: Path) -> None:
    picture(tmp_path / "nut/train/good/0.png")
    for stem in ("7", "7_1"):
        picture(tmp_path / f"nut/test/bent/{stem}.png")
        mask(tmp_path / f"nut/ground_truth/bent/{stem}_mask.png")
    mask(tmp_path / "nut/ground_truth/bent/7_2_mask.png")
    found = {s.path.stem: [m.stem for m in s.masks] for s in find_category(tmp_path, "nut").test}
    assert found == {"7": ["7_2_mask", "7_mask"], "7_1": ["7_1_mask"]}


def test_flat_masks_of_images_that_share_a_name_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "ok/0.png")
    for place in ("bad/a/0.png", "bad/b/0.png", "bad/b/1.png", "bad/2.png"):
        picture(tmp_path / place)
    for i in (0, 1, 2):
        mask(tmp_path / f"masks/{i}.png")
    category = from_folders(tmp_path / "ok", tmp_path / "bad", tmp_path / "masks")
    assert category.layout == "own folders"
    assert {s.path.relative_to(tmp_path).as_posix() for s in category.test if s.mask is None} == {
        "bad/a/0.png",
        "bad/b/0.png",
    }
    assert sum("share this name" in finding.what for finding in category.findings) == 2
