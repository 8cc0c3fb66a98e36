"""Naming sources on a command line: files, folders, patterns, what is refused and with which words."""

from __future__ import annotations

import glob
import os
from pathlib import Path, PurePath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need
from PIL import Image

from saae_runtime.errors import ConfigError, DataError, ImageError, SaaeError
from saae_runtime.sources import files as sources
from saae_runtime.sources import folders, video
from saae_runtime.sources.files import find_sources, read_frames


def image(path: Path, gray: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), gray).save(path)
    return path


def test_folder_is_sorted_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.bmp", "deeper/d.png", ".hidden.png"):
        image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [source.path.name for source in find_sources([str(tmp_path)])] == ["a.JPG", "b.png", "c.bmp"]
    found = find_sources([str(tmp_path)], recursive=True)
    assert [source.stem for source in found] == [PurePath(stem) for stem in ("a", "b", "c", "deeper/d")]


def test_several_folders_with_the_same_names_do_not_share_picture_names(tmp_path: Path) -> None:
    for name in ("good/000.png", "good/000.jpg", "bent/000.png"):
        image(tmp_path / name)
    found = find_sources([str(tmp_path / "good"), str(tmp_path / "bent")])
    assert [str(source.stem) for source in found] == ["good/000", "good/000-2", "bent/000"]


@given(st.lists(st.sampled_from(["a", "A", "a-2", "b/a", "b/a-2", "a-3"]), max_size=12))
def test_stems_are_unique_even_where_case_does_not_count(stems: list[str]) -> None:
    taken: set[str] = set()
    unique = [sources.unique_stem(PurePath(stem), taken) for stem in stems]
    assert len({str(stem).lower() for stem in unique}) == len(stems)
    assert [stem.parent for stem in unique] == [PurePath(stem).parent for stem in stems]


def test_pattern_crosses_folders_and_keeps_them_apart(tmp_path: Path) -> None:
    for name in ("x/1.png", "y/1.png", "y/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith("txt") else image(tmp_path / name)
    found = find_sources([f"{tmp_path}/*/*"])
    assert [str(source.stem) for source in found] == ["x/1", "y/1"]


def test_a_pattern_that_climbs_files_its_pictures_below_the_folder_all_the_same(tmp_path: Path) -> None:
    for name in ("in/a/0.png", "in/b/0.png", "in/top.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image(tmp_path / name)
    for pattern in ("in/*/../top.png", "in/a/../*/0.png", "in/*/../../*/*/0.png"):
        stems = [source.stem for source in find_sources([str(tmp_path / pattern)])]
        assert stems
        assert not any(".." in stem.parts or stem.is_absolute() for stem in stems)
        assert len(set(stems)) == len(stems)


def test_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = image(tmp_path / "part[1].png")
    assert [source.path for source in find_sources([str(path)])] == [path]


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("bottel.png", ConfigError, "bottle.png"),
        ("nowhere/at/all.png", ConfigError, "is not there either"),
        ("notes.txt", ConfigError, "Known endings"),
        ("empty", DataError, "Files ending in"),
        ("*.gif", DataError, "one folder"),
        ("camera:first", ConfigError, "by its number"),
    ],
)
def test_names_that_cannot_be_used_say_why(tmp_path: Path, monkeypatch, name: str, kind: type, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "bottle.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind) as caught:
        find_sources([name])
    assert word in caught.value.why
    assert caught.value.cure


def test_empty_folder_with_images_below_says_recursive(tmp_path: Path) -> None:
    image(tmp_path / "sub" / "a.png")
    with pytest.raises(DataError, match="--recursive"):
        find_sources([str(tmp_path)])


def test_missing_libraries_are_said_before_anything_starts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "film.mp4").write_bytes(b"x")
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        find_sources([str(tmp_path / "film.mp4")])
    assert "pip install 'saae[video]'" in caught.value.cure
    with pytest.raises(ConfigError) as caught:
        find_sources(["camera:0"])
    assert "opencv" in caught.value.cure


def test_bad_image_stands_in_its_place_and_the_rest_is_read(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 10)
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(image(tmp_path / "whole.png").read_bytes()[:40])
    image(tmp_path / "d.png", 20)
    (tmp_path / "whole.png").unlink()
    frames = list(read_frames(find_sources([str(tmp_path)])))
    assert [frame.error is None for frame in frames] == [True, False, False, True]
    assert all(isinstance(frame.error, ImageError) for frame in frames[1:3])
    np.testing.assert_array_equal(frames[3].image, np.full((4, 6, 3), 20))


def test_image_that_goes_between_listing_and_reading_is_an_error_frame(tmp_path: Path) -> None:
    found = find_sources([str(image(tmp_path / "a.png"))])
    (tmp_path / "a.png").unlink()
    (frame,) = read_frames(found)
    assert isinstance(frame.error, SaaeError)
    assert frame.image is None


# --- links, pipes, pages, odd names ---


def tree_with_links(root: Path) -> Path:
    for name in ("in/a.png", "in/deep/b.png", "elsewhere/c.png", "beside.png"):
        image(root / name)
    (root / "in" / "deep" / "up").symlink_to("..")
    (root / "in" / "out").symlink_to("../..")
    (root / "in" / "a_link").symlink_to("../elsewhere")
    (root / "in" / "deep" / "a_link_again").symlink_to("../../elsewhere")
    (root / "in" / "z.png").symlink_to("../beside.png")
    return root / "in"


@pytest.mark.parametrize("how", ["folder", "pattern", "parts"])
def test_a_link_to_a_folder_is_followed_once_and_a_link_back_is_not(tmp_path: Path, how: str) -> None:
    folder = tree_with_links(tmp_path)
    names, recursive = {
        "folder": ([str(folder)], True),
        "pattern": ([f"{folder}/**/*.png"], False),
        "parts": ([f"{folder}/**/**/*.png"], False),
    }[how]
    found = [str(source.path.relative_to(folder)) for source in find_sources(names, recursive)]
    if how == "parts":  # `**` twice begins anew, and still each real folder is read once on each way
        assert set(found) >= {"a.png", "a_link/c.png", "deep/b.png", "z.png"}
        assert len(found) < 12
    else:
        assert sorted(found) == ["a.png", "a_link/c.png", "deep/b.png", "z.png"]


def test_patterns_match_as_glob_does_where_there_are_no_links(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/2.png", "a/b/.3.png", "a/.h/4.png", "c/5.jpg", "c/b/6.png", "7.png"):
        image(tmp_path / name)
    for pattern in ("*.png", "**/*.png", "*/b/*", "a/**", "**/b/?.png", "[ac]/*.[jp]*g", "a/../c/*", "**", "*/*/*.png"):
        expected = {Path(found) for found in glob.glob(f"{tmp_path}/{pattern}", recursive=True)}  # noqa: PTH207
        expected = {path for path in expected if path.is_file()}
        assert {path for path in folders.expand(f"{tmp_path}/{pattern}") if path.is_file()} == expected, pattern


@pytest.mark.parametrize(
    ("pattern", "path", "taken"),
    [
        ("f/*.png", "f/a.heatmap.png", True),
        ("f/*.jpg", "f/a.heatmap.png", False),
        ("f/*.png", "f/out/a.heatmap.png", False),
        ("f/**/*.png", "f/out/a.heatmap.png", True),
        ("f/**/*.png", "f/a.heatmap.png", True),
        ("f/*/cam?.png", "f/out/cam1.heatmap.png", False),
        ("f/*/cam*", "f/out/cam1.heatmap.png", True),
        ("f/**", "f/out/x/cam1.heatmap.png", True),
        ("f/*.png", "g/a.heatmap.png", False),
        ("*/*.png", "g/a.heatmap.png", True),
    ],
)
def test_whether_a_pattern_would_take_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, path: str, taken: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folders.pattern_takes(pattern, Path(path)) == taken
    assert folders.pattern_takes(str(tmp_path / pattern), Path(path)) == taken
    image(tmp_path / path)
    assert (tmp_path / path in folders.expand(str(tmp_path / pattern))) == taken


@pytest.mark.parametrize("name", ["..png", "...png", "..a.png", ".png.png"])
def test_a_name_of_dots_is_filed_below_its_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "in" / name
    image(tmp_path / "in" / "x.png").rename(path)
    (source,) = find_sources([str(path)])
    stem = source.stem
    assert stem.parent == PurePath()
    picture = tmp_path / "out" / stem.with_name(f"{stem.name}.mask.png")
    assert picture.resolve().parent == tmp_path / "out"


def test_each_page_is_a_frame_with_a_name_of_its_own(tmp_path: Path) -> None:
    pages = [Image.new("L", (6, 4), gray) for gray in (10, 20, 30)]
    pages[0].save(tmp_path / "part.tif", save_all=True, append_images=pages[1:])
    image(tmp_path / "single.tif", 40)
    found = list(read_frames(find_sources([str(tmp_path)])))
    assert [Path(frame.name).name for frame in found] == ["part.tif#1", "part.tif#2", "part.tif#3", "single.tif"]
    assert [int(frame.image[0, 0, 0]) for frame in found] == [10, 20, 30, 40]
    assert [str(frame.stem) for frame in found] == ["part#1", "part#2", "part#3", "single"]
    assert [frame.facts is not None for frame in found] == [False, False, True, True]


def test_no_two_frames_are_filed_under_one_name(tmp_path: Path) -> None:
    """A video beside the folder of its frames, and a file of several pages beside one that is named like a page."""
    need("av")
    (tmp_path / "clip.mp4").write_bytes(b"")
    image(tmp_path / "clip" / "000000.png")
    image(tmp_path / "part#2.png")
    image(tmp_path / "part.png")
    image(tmp_path / "alone#2.png")
    names = [str(tmp_path / name) for name in ("clip.mp4", "clip", "part#2.png", "part.png", "alone#2.png")]
    for ordered in (names, names[::-1]):
        found = {Path(source.name).name: str(source.stem) for source in find_sources(ordered)}
        assert found == {
            "clip.mp4": "clip-video",
            "000000.png": "clip/000000",
            "part#2.png": "part#2-file",
            "part.png": "part",
            "alone#2.png": "alone#2",
        }


@pytest.mark.parametrize("name", ["x.png", "x.mp4"])
def test_what_is_no_file_is_an_error_of_its_frame(tmp_path: Path, name: str) -> None:
    need("av")
    image(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    named = [str(tmp_path / name), str(tmp_path / "a.png")]
    pipe, good = read_frames(find_sources(named))
    assert isinstance(pipe.error, ImageError)
    assert "not a regular file" in pipe.error.what
    assert good.image is not None
    assert len(find_sources([f"{tmp_path}/*"])) == 2
