"""Where a build's images come from, and in which order the places are tried."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from PIL import Image
from tiny_builds import draw

import saae_export.pipeline.images as sources
from saae_export.pipeline.images import Request, find_images, is_named, samples_named, shared_size, without_excluded
from saae_runtime.errors import ConfigError, DataError
from saae_train.data.category import Category, Sample


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; demo sets are drawn small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(sources.DATA_VARIABLE, raising=False)
    small = functools.partial(sources.write_demo, size=(64, 64), train=6, test_good=1, per_defect=1)
    monkeypatch.setattr(sources, "write_demo", small)
    return tmp_path


def test_a_demo_category_is_drawn_where_nothing_else_is_there(here: Path) -> None:
    category, words = find_images(Request("weave"), here / "demo")
    assert category.synthetic
    assert "drawn" in words
    assert len(category.train) == 6
    drawn = (here / "demo" / "weave" / "train" / "good" / "000.png").stat().st_mtime_ns
    find_images(Request("weave"), here / "demo")
    assert (here / "demo" / "weave" / "train" / "good" / "000.png").stat().st_mtime_ns == drawn, "drawn again"


def test_photographs_come_before_the_demo(here: Path) -> None:
    draw(here / "data")
    category, words = find_images(Request("weave"), here / "demo")
    assert not category.synthetic
    assert words == "./data"
    assert not (here / "demo").exists()
    assert find_images(Request("weave", demo=True), here / "demo")[0].synthetic


def test_the_variable_comes_before_data_and_an_option_before_both(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "named", "given"):
        draw(here / name)
    monkeypatch.setenv(sources.DATA_VARIABLE, str(here / "named"))
    assert find_images(Request("weave"), here / "demo")[0].root == here / "named" / "weave"
    given = find_images(Request("weave", here / "given"), here / "demo")[0]
    assert given.root == here / "given" / "weave"


def test_the_only_category_needs_no_name(here: Path) -> None:
    draw(here / "data")
    assert find_images(Request(data=here / "data"), here / "demo")[0].name == "weave"
    (here / "data" / "other" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Which category"):
        find_images(Request(data=here / "data"), here / "demo")


def test_a_missing_category_names_near_ones(here: Path) -> None:
    draw(here / "data")
    with pytest.raises(ConfigError) as caught:
        find_images(Request("zippr"), here / "demo")
    assert "zipper" in caught.value.cure
    with pytest.raises(DataError) as there:
        find_images(Request("waeve", here / "data"), here / "demo")
    assert "weave" in there.value.cure


def test_free_folders(here: Path) -> None:
    weave = draw(here / "data") / "weave"
    good, bad, masks = (weave / "train" / "good",), (weave / "test",), (weave / "ground_truth",)
    category, _ = find_images(Request("mine", normal=good, abnormal=bad, masks=masks), here / "demo")
    assert category.name == "mine"
    assert category.has_masks
    assert {sample.label for sample in category.test if not sample.is_anomalous} == {"good"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "No product"),
        (Request(normal=(Path("a"),), data=Path("b")), "--normal and --data"),
        (Request(normal=(Path("a"),), demo=True), "--normal and --data"),
        (Request("x", normal_test=(Path("a"),)), "--normal-test"),
        (Request("x", abnormal=(Path("a"),)), "--abnormal"),
    ],
)
def test_requests_that_contradict_themselves(here: Path, request_: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_images(request_, here / "demo")


def test_shared_size_sees_images_as_they_are_read(tmp_path: Path) -> None:
    upright, turned = tmp_path / "upright.jpg", tmp_path / "turned.jpg"
    Image.new("RGB", (30, 40)).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    Image.new("RGB", (40, 30)).save(turned, exif=exif)
    samples = tuple(Sample(path, "good", None, False) for path in (upright, turned))
    assert shared_size(samples) == (40, 30)
    Image.new("RGB", (40, 30)).save(turned)
    assert shared_size(samples) is None
    assert shared_size(()) is None


@pytest.mark.parametrize("name", ["part [3].png", "a*b?.png", "plain.png"])
def test_an_image_is_left_out_by_its_name_whatever_is_in_it(tmp_path: Path, name: str) -> None:
    for file in (name, "other.png", "a-b-.png"):
        Image.new("L", (40, 40)).save(tmp_path / file)
    samples = tuple(Sample(path, "good", None, False) for path in sorted(tmp_path.iterdir()))
    left = without_excluded(Category("part", tmp_path, samples, ()), [name]).train
    assert {sample.path.name for sample in left} == {"other.png", "a-b-.png"} - ({"a-b-.png"} if "*" in name else set())
    assert without_excluded(Category("part", tmp_path, samples, ()), ["o*.png"]).train == tuple(
        sample for sample in samples if sample.path.name != "other.png"
    )


def test_an_image_whose_name_needs_its_folder_is_named_with_and_without(tmp_path: Path) -> None:
    paths = (tmp_path / "day" / "1.png", tmp_path / "night" / "1.png", tmp_path / "night" / "2.png")
    samples = [Sample(path, "good", None, False) for path in paths]
    assert samples_named(samples, ["night/1.png"], "--keep") == {samples[1]}
    assert samples_named(samples, ["1.png"], "--keep") == set(samples[:2])
    assert samples_named(samples, ["night/*", "2.*"], "--keep") == {samples[1], samples[2]}
    assert is_named("night/1.png", "1.png")  # as a build asks when it names an image to look at
    assert not is_named("night/1.png", "night")
    with pytest.raises(ConfigError, match=r"--keep night matches no image") as caught:
        samples_named(samples, ["1.png", "night"], "--keep")
    assert "The 3 normal images are named like day/1.png" in caught.value.why
