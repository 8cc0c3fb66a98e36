"""Every kind of bad file is found in one pass, with its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from deep_colour import deep_png
from PIL import Image

from saae_runtime.errors import DataError
from saae_runtime.images import read_mask
from saae_train.data.category import find_category
from saae_train.data.check import Report, check
from saae_train.data.demo import write_demo


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    write_demo(root, "zipper", size=(64, 64), train=6, test_good=2, per_defect=1)
    return root


@pytest.fixture
def zipper(drawn: Path, tmp_path: Path) -> Path:
    """A copy of a good category, to be spoilt."""
    return Path(shutil.copytree(drawn / "zipper", tmp_path / "data/zipper"))


def run(folder: Path, deep: bool = True) -> Report:
    return check(find_category(folder.parent, folder.name), deep=deep)


def by_file(folder: Path, report: Report) -> dict[str, str]:
    return {p.path.relative_to(folder).as_posix(): p.what for p in report.problems}


def test_good_data_passes(zipper: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check(find_category(zipper.parent, "zipper"), progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.warnings == ()
    assert report.images == 15
    assert seen == [(i, 15) for i in range(1, 16)]
    report.raise_if_bad()


def test_all_bad_files_are_reported_at_once(zipper: Path) -> None:
    train, test, truth = zipper / "train/good", zipper / "test", zipper / "ground_truth"
    png = (train / "000.png").read_bytes()
    (train / "000.png").write_bytes(png[: len(png) // 2])
    (train / "001.png").write_bytes(b"")
    (train / "002.png").write_bytes(b"this is a letter, not a picture" * 9)
    jpeg = train / "010.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(jpeg, quality=95)
    jpeg.write_bytes(jpeg.read_bytes()[:1500])
    Image.fromarray(np.ones((64, 64), np.float32)).save(train / "011.tif")
    (train / "old.gif").write_bytes(b"GIF89a")
    pages = [Image.fromarray(np.full((64, 64), level, np.uint8)) for level in (1, 2)]
    pages[0].save(train / "012.tif", save_all=True, append_images=pages[1:])
    shutil.copy(train / "003.png", test / "good/copy.png")
    shutil.copy(test / "good/001.png", test / "rough/copy.png")
    Image.fromarray(np.ones((64, 64), np.uint8)).save(truth / "rough/copy_mask.png")
    Image.fromarray(np.ones((64, 60), np.uint8)).save(truth / "split_teeth/000_mask.png")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(truth / "combined/000_mask.png")
    (truth / "broken_teeth/000_mask.png").write_bytes(b"\x89PNG")
    (truth / "rough/000_mask.png").unlink()
    Image.fromarray(np.ones((64, 64), np.uint8)).save(truth / "fabric_border/9_mask.png")

    report = run(zipper)
    found = by_file(zipper, report)
    expected = {
        "train/good/000.png": "cannot be read",
        "train/good/001.png": "empty",
        "train/good/002.png": "cannot be read as an image",
        "train/good/012.tif": "holds 2 pages",
        "train/good/010.jpg": "truncated",
        "train/good/011.tif": "floating",
        "train/good/old.gif": "not an image file",
        "test/good/copy.png": "same image as the training image",
        "test/rough/copy.png": "one is normal, the other defective",
        "test/rough/000.png": "has no mask",
        "ground_truth/split_teeth/000_mask.png": "60 x 64 pixels",
        "ground_truth/combined/000_mask.png": "all black",
        "ground_truth/broken_teeth/000_mask.png": "cannot be read",
        "ground_truth/fabric_border/9_mask.png": "without an image",
    }
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert name not in found[name], "the file's name stands in front already"
    assert not report.ok

    with pytest.raises(DataError) as caught:
        report.raise_if_bad(show=5)
    assert len(caught.value.problems) == len(expected)
    assert "14 files are not usable" in caught.value.what
    assert "and 9 more" in caught.value.why


def test_side_files_are_one_line(zipper: Path) -> None:
    for name in ("train/good/Thumbs.db", "train/good/000.json", "test/rough/notes.txt", "ground_truth/readme.md"):
        (zipper / name).write_text("x")
    report = run(zipper)
    assert report.ok
    (warning,) = report.warnings
    assert warning.path == zipper
    assert warning.what == "4 files that are not images are ignored (.db, .json, .md, .txt)"


def test_copies_are_found_by_pixels_not_by_bytes(zipper: Path) -> None:
    Image.open(zipper / "train/good/000.png").convert("RGB").save(zipper / "test/good/other.bmp")
    found = by_file(zipper, run(zipper))
    assert list(found) == ["test/good/other.bmp"]


def test_same_pixels_in_another_shape_are_another_picture(zipper: Path) -> None:
    flat = np.arange(64 * 36, dtype=np.uint8)
    Image.fromarray(flat.reshape(64, 36)).save(zipper / "train/good/tall.png")
    Image.fromarray(flat.reshape(36, 64)).save(zipper / "test/good/wide.png")
    assert run(zipper).problems == ()


def test_oddities_are_warnings(zipper: Path) -> None:
    train = zipper / "train/good"
    shutil.copy(train / "000.png", train / "copy.png")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(train / "flat.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 64, 4), dtype=np.uint8)).save(train / "alpha.png")
    Image.open(train / "001.png").convert("1").save(train / "bits.png")
    deep_png(train / "deep.png", np.random.default_rng(1).integers(0, 65535, (64, 64, 3), dtype=np.uint16))
    report = run(zipper)
    assert report.ok
    warned = {(w.path.name, w.what) for w in report.warnings}
    for name, words in (
        ("copy.png", "same image"),
        ("flat.png", "one colour throughout"),
        ("alpha.png", "transparency"),
        ("alpha.png", "64 x 20"),
        ("bits.png", "black and white only"),
        ("deep.png", "16-bit colour"),
        ("good", "mixes 8 gray and 3 colour"),
    ):
        assert any(n == name and words in what for n, what in warned), (name, words, warned)


def test_masks_in_lossy_formats_are_a_warning(zipper: Path) -> None:
    truth = zipper / "ground_truth"
    disc = np.hypot(*np.mgrid[-32:32, -32:32]) < 15
    mask = Image.fromarray(np.where(disc, np.uint8(255), np.uint8(0)))
    kinds = {"rough": ("jpg", {"quality": 75}), "combined": ("webp", {}), "split_teeth": ("webp", {"lossless": True})}
    for label, (suffix, keywords) in kinds.items():
        (truth / label / "000_mask.png").unlink()
        mask.save(truth / label / f"000_mask.{suffix}", **keywords)
    assert abs(read_mask(truth / "rough/000_mask.jpg").sum() / disc.sum() - 1) < 0.02
    report = run(zipper)
    assert report.ok, report.problems
    warned = {w.path.relative_to(truth).as_posix() for w in report.warnings if "lossy format" in w.what}
    assert warned == {"rough/000_mask.jpg", "combined/000_mask.webp"}


def test_an_image_given_as_its_own_mask_is_a_problem(zipper: Path) -> None:
    truth, test = zipper / "ground_truth", zipper / "test"
    shutil.copy(test / "rough/000.png", truth / "rough/000_mask.png")
    Image.open(test / "combined/000.png").convert("L").save(truth / "combined/000_mask.png")
    found = by_file(zipper, run(zipper))
    assert set(found) == {"ground_truth/rough/000_mask.png", "ground_truth/combined/000_mask.png"}
    assert all("photograph" in what for what in found.values())


def test_masks_that_mark_nearly_everything_are_a_warning(zipper: Path) -> None:
    path = zipper / "ground_truth/rough/000_mask.png"
    Image.fromarray(255 - np.asarray(Image.open(path).convert("L"))).save(path)
    disc = np.hypot(*np.mgrid[-32:32, -32:32]) < 20  # a third: inverted, two thirds and the whole border
    Image.fromarray(np.where(disc, np.uint8(0), np.uint8(255))).save(zipper / "ground_truth/combined/000_mask.png")
    half = np.zeros((64, 64), np.uint8)
    half[:40] = 255  # a large defect that leaves a side free
    Image.fromarray(half).save(zipper / "ground_truth/split_teeth/000_mask.png")
    report = run(zipper)
    assert report.ok
    warned = {w.path.relative_to(zipper / "ground_truth").as_posix() for w in report.warnings if "inverted" in w.what}
    assert warned == {"rough/000_mask.png", "combined/000_mask.png"}


def test_soft_masks_are_a_warning_and_cut_half_way(zipper: Path) -> None:
    path = zipper / "ground_truth/rough/000_mask.png"
    ramp = np.zeros((64, 64), np.uint8)
    ramp[20:40, 20:30] = np.linspace(20, 240, 10).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    report = run(zipper)
    assert report.ok
    (warning,) = report.warnings
    assert warning.path == path
    assert "50 % of what is not black" in warning.what
    assert read_mask(path).sum() == 100


def test_a_mask_turned_by_its_own_exif_fits(zipper: Path) -> None:
    image, mask = zipper / "test/rough/000.png", zipper / "ground_truth/rough/000_mask.png"
    picture, truth = Image.open(image).convert("RGB").crop((0, 0, 64, 40)), Image.open(mask).crop((0, 0, 64, 40))
    truth.paste(255, (5, 5, 9, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(image, exif=exif)
    truth.save(mask, exif=exif)
    assert run(zipper).ok
    truth.save(mask)  # drawn on the picture as it lies in the file
    found = by_file(zipper, run(zipper))
    assert list(found) == ["ground_truth/rough/000_mask.png"]
    assert "EXIF" in found["ground_truth/rough/000_mask.png"]


def twelve_bits(folder: Path, top: int = 4095) -> None:
    """Saves every image of a category again as a camera of few bits does: gray, 16-bit, up to `top`."""
    for path in [*folder.glob("train/*/*.png"), *folder.glob("test/*/*.png")]:
        gray = np.asarray(Image.open(path).convert("L")).astype(np.float64)
        levels = np.rint(gray * (top / max(gray.max(), 1))).astype(np.uint16)
        Image.fromarray(levels).save(path)


@pytest.mark.parametrize(
    ("top", "bits", "level"), [(4095, 12, 4095), (900, 10, 1023), (16000, 14, 16383), (255, 8, 255)]
)
def test_cameras_of_few_bits_are_a_warning(zipper: Path, top: int, bits: int, level: int) -> None:
    twelve_bits(zipper, top)
    report = run(zipper)
    assert report.ok
    (warning,) = report.warnings
    assert f"{bits}-bit camera" in warning.what
    assert f"--white-level {level}" in warning.what
    category = find_category(zipper.parent, "zipper").with_white_level(level)
    assert check(category).warnings == ()
    assert category.train[0].read().max() > 250 * top / (level + 1)


def test_full_range_is_no_warning_and_clipping_is_one(zipper: Path) -> None:
    twelve_bits(zipper, 60000)
    assert run(zipper).warnings == ()
    report = check(find_category(zipper.parent, "zipper").with_white_level(4095))
    wanted = "15 16-bit images are brighter than the white level of 4095, up to 60000"
    assert any(wanted in warning.what for warning in report.warnings)


def test_no_masks_at_all_is_a_warning(zipper: Path) -> None:
    shutil.rmtree(zipper / "ground_truth")
    report = run(zipper)
    assert report.ok
    assert "only image-level metrics" in report.warnings[0].what


def test_quick_check_reads_headers_only(zipper: Path) -> None:
    good = zipper / "train/good"
    png = (good / "000.png").read_bytes()
    (good / "000.png").write_bytes(png[: len(png) // 2])
    (good / "001.png").write_bytes(b"")
    assert list(by_file(zipper, run(zipper, deep=False))) == ["train/good/001.png"]
    assert list(by_file(zipper, run(zipper))) == ["train/good/000.png", "train/good/001.png"]


def test_ctrl_c_stops_the_pass(zipper: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(find_category(zipper.parent, "zipper"), progress=interrupt, workers=1)


def test_real_images_pass(shared_data: Path) -> None:
    report = check(find_category(shared_data, "cookie"))
    assert report.problems == ()
    assert report.images == 77
