"""Other tools' formats as saae-run writes them, read by those tools."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path, PurePath

import numpy as np
import pytest
import saae_run
import tifffile
from folders import leftovers
from needs import need
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console
from saae_run import SPOT
from tiny_bundle import CATEGORY, gray_frame

from saae_runtime import Engine, files
from saae_runtime.cli.exports import Export
from saae_runtime.cli.outputs import Standard
from saae_runtime.cli.parquet import ParquetFile
from saae_runtime.cli.scoring import Outcome
from saae_runtime.cli.sink import Sink
from saae_runtime.errors import SaaeError
from saae_runtime.images import read_image
from saae_runtime.render import save_png
from saae_runtime.sources.files import Frame, Source

pytestmark = pytest.mark.needs("onnxruntime")


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A category as the benchmarks lay it out: clean, defective, one of a different size, and one that is no image."""
    folder = tmp_path / "data" / CATEGORY / "test"
    save_png(folder / "good" / "000.png", gray_frame())
    spots = gray_frame(spot=SPOT)
    spots[40:50, 60:80] = 0
    save_png(folder / "cut" / "000.png", spots)
    save_png(folder / "cut" / "001.png", gray_frame((128, 192), (40, 60, 40, 50)))
    (folder / "cut" / "002.png").write_bytes(b"no image")
    return folder


def run(*arguments: object):
    return saae_run.run(*arguments, "--backend", "onnxruntime:cpu")  # which `expected` compares with


def expected(bundle: Path, path: Path):
    with Engine(bundle, backend="onnxruntime:cpu") as engine:
        return engine(read_image(path))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("r.csv", "--csv"),
        ("R.CSV", "--csv"),
        ("r.jsonl", "--json"),
        pytest.param("r.parquet", "--parquet", marks=pytest.mark.needs("pyarrow")),
    ],
)
def test_out_with_the_name_of_a_file_is_that_files_option(
    bundle: Path, frames: Path, tmp_path: Path, name: str, option: str
) -> None:
    """Also beside a folder of maps; no picture is made."""
    written = []
    for folder, word in ((tmp_path / "a", "--out"), (tmp_path / "b", option)):
        folder.mkdir()
        done = run(bundle, frames / "cut", word, folder / name, "--maps", folder / "maps")
        assert done.exit_code == 1, done.output
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {name, "maps"}
        written.append(without_times(folder / name))
    assert len(written[0]) == 3
    assert written[0] == written[1]


def without_times(path: Path) -> list[dict[str, object]]:
    """The rows of a file of results."""
    if path.suffix == ".parquet":
        found = need("pyarrow.parquet").read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        found = rows(path)
    return [{key: value for key, value in row.items() if key != "ms"} for row in found]


def test_a_folder_may_have_the_name_of_a_file(bundle: Path, frames: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures.csv"
    folder.mkdir()
    assert run(bundle, frames / "cut", "--out", folder, "--masks").exit_code == 1
    assert len(list(folder.rglob("*.png"))) == 2


# --- CSV ---


def test_csv_says_what_the_results_say(bundle: Path, frames: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "results.csv"
    done = run(bundle, frames, "-r", "--csv", table)
    assert done.exit_code == 1, done.output
    found = {Path(row["source"]).relative_to(frames).as_posix(): row for row in rows(table)}
    assert set(found) == {"cut/000.png", "cut/001.png", "cut/002.png", "good/000.png"}
    for name in ("cut/000.png", "cut/001.png", "good/000.png"):
        result, row = expected(bundle, frames / name), found[name]
        assert row["verdict"] == ("defect" if result.is_anomalous else "clean")
        assert float(row["score"]) == result.score
        assert float(row["rank"]) == result.rank
        assert (int(row["height"]), int(row["width"])) == result.size
        assert float(row["defect_share"]) == result.mask.mean()
        assert int(row["regions"]) == len(result.regions())
        if result.is_anomalous:
            best = result.regions()[0]
            assert tuple(int(row[name]) for name in ("left", "top", "right", "bottom")) == best.bbox
            assert (int(row["peak_x"]), int(row["peak_y"]), float(row["peak_score"])) == (*best.peak, best.score)
        assert row["error"] == ""
    broken = found["cut/002.png"]
    assert broken["verdict"] == broken["score"] == ""
    assert "002.png" in broken["error"]


def test_csv_is_appended_to_and_mended(bundle: Path, frames: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    run(bundle, frames / "good", "--csv", table)
    with table.open("a") as stream:
        stream.write("cut off by a power c")
    run(bundle, frames / "good", "--csv", table)
    assert [row["verdict"] for row in rows(table)] == ["clean", "clean"]
    assert table.read_text().count("source,frame") == 1


def test_csv_of_another_is_left_alone(bundle: Path, frames: Path, tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("a,b\n1,2\n")
    done = run(bundle, frames / "good", "--csv", table)
    assert done.exit_code == 2
    assert "other columns" in done.output
    assert table.read_text() == "a,b\n1,2\n"


def test_csv_with_any_name_of_a_file(bundle: Path, frames: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd" / 'a "quoted", name\n.png'
    save_png(odd, gray_frame())
    run(bundle, odd, frames / "good", "--csv", tmp_path / "results.csv")
    assert rows(tmp_path / "results.csv")[0]["source"] == str(odd).replace("\n", " ")


def test_a_full_disk_ends_no_run_and_is_told(bundle: Path, frames: Path, tmp_path: Path, monkeypatch) -> None:
    def full(path, data):
        raise files.storage_error(Path(path), OSError(28, "No space left on device"))

    monkeypatch.setattr("saae_runtime.cli.exports.write_bytes", full)
    done = run(bundle, frames / "cut", "--maps", tmp_path / "maps", "--csv", tmp_path / "results.csv")
    assert done.exit_code == 4
    assert "2 results not exported" in done.output
    assert len(rows(tmp_path / "results.csv")) == 3


# --- Parquet ---


@pytest.mark.needs("pyarrow")
def test_parquet_with_an_unreadable_file_whose_name_is_no_utf8(bundle: Path, frames: Path, tmp_path: Path) -> None:
    odd = frames / "good" / os.fsdecode(b"T\xfcr.png")
    try:
        odd.write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    done = run(bundle, frames / "good", "--parquet", tmp_path / "results.parquet")
    assert done.exit_code == 3, done.output
    read = need("pyarrow.parquet").read_table(tmp_path / "results.parquet").to_pylist()
    assert len(read) == 2
    assert [r"T\udcfcr.png" in row["error"] for row in read if row["error"]] == [True]


@pytest.mark.needs("pyarrow")
def test_parquet_holds_the_same_as_the_results(bundle: Path, frames: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "results.parquet"
    done = run(bundle, frames, "-r", "--parquet", target)
    assert done.exit_code == 1, done.output
    read = need("pyarrow.parquet").read_table(target).to_pylist()
    found = {Path(row["source"]).relative_to(frames).as_posix(): row for row in read}
    assert set(found) == {"cut/000.png", "cut/001.png", "cut/002.png", "good/000.png"}
    for name in ("cut/000.png", "cut/001.png", "good/000.png"):
        result, row = expected(bundle, frames / name), found[name]
        assert row["verdict"] == ("defect" if result.is_anomalous else "clean")
        assert (row["score"], row["rank"], row["threshold"]) == (result.score, result.rank, result.threshold)
        assert row["regions"] == [region.to_dict() for region in result.regions()]
        assert row["error"] is None
    assert found["cut/002.png"]["verdict"] is None
    assert "002.png" in found["cut/002.png"]["error"]
    assert leftovers(tmp_path) == []


@pytest.mark.needs("pyarrow")
def test_more_rows_than_a_group_has(bundle: Path, frames: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("saae_runtime.cli.parquet._ROWS", 2)
    run(bundle, frames / "cut", "--parquet", tmp_path / "r.parquet")
    file = need("pyarrow.parquet").ParquetFile(tmp_path / "r.parquet")
    assert (file.num_row_groups, file.metadata.num_rows) == (2, 3)


@pytest.mark.needs("pyarrow")
def test_what_was_begun_and_not_finished_leaves_no_parquet(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    target.write_bytes(b"what was there before")
    begun = ParquetFile(target)
    begun.discard()
    begun.discard()
    assert target.read_bytes() == b"what was there before"
    assert leftovers(tmp_path) == []


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def unreadable(number: int) -> Outcome:
    """An outcome without a result, of a few bytes."""
    error = SaaeError(f"{number}.png cannot be read.")
    return Outcome(Frame(Source("image", f"{number}.png", PurePath(str(number))), 0, None, error), error=error)


def sink_of(export: Export) -> Sink:
    standard = Standard(io.StringIO())
    return Sink(Console(quiet=True), standard, None, None, None, lambda _: None, 1, True, exports=[export])


@pytest.mark.needs("pyarrow")
def test_parquet_on_a_disk_that_is_full_for_a_while_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    sink = sink_of(ParquetFile(target))
    for numbers, room in ((range(1500), None), (range(1500, 4500), 5000), (range(4500, 6000), None)):
        with nullcontext() if room is None else full_beyond(room):
            for number in numbers:
                sink.take(unreadable(number))
    sink.finish()
    assert sink.words() == []
    rows = need("pyarrow.parquet").read_table(target).to_pylist()
    assert [row["source"] for row in rows] == [f"{number}.png" for number in range(6000)]


@pytest.mark.needs("pyarrow")
def test_a_parquet_file_that_cannot_be_finished_counts_all_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    target.write_bytes(b"what was there before")
    sink = sink_of(ParquetFile(target))
    with full_beyond(5000):
        for number in range(3000):
            sink.take(unreadable(number))
        sink.finish()
    assert sink.words() == ["3000 results not exported"]
    assert target.read_bytes() == b"what was there before"
    assert leftovers(tmp_path) == []


# --- COCO ---


def test_a_coco_file_that_cannot_be_written_counts_all_its_images(
    bundle: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: object) -> None:
        raise files.storage_error(path, OSError(28, "No space left on device"))

    monkeypatch.setattr("saae_runtime.cli.exports.write_json", full)
    done = run(bundle, frames / "cut", "--coco", tmp_path / "r.json")
    assert done.exit_code == 4
    assert "2 results not exported" in done.output


def test_coco_as_pycocotools_reads_it(bundle: Path, frames: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    assert run(bundle, frames, "-r", "--coco", target).exit_code == 1
    with redirect_stdout(io.StringIO()):
        data = COCO(str(target))
    assert [item["name"] for item in data.loadCats(data.getCatIds())] == ["defect"]
    images = {Path(item["file_name"]).relative_to(frames).as_posix(): item for item in data.imgs.values()}
    assert set(images) == {"cut/000.png", "cut/001.png", "good/000.png"}
    for name, image in images.items():
        result = expected(bundle, frames / name)
        assert (image["height"], image["width"], image["score"]) == (*result.size, result.score)
        found = data.loadAnns(data.getAnnIds(imgIds=image["id"]))
        assert len(found) == len(result.regions())
        whole = np.zeros(result.size, np.bool_)
        for item in found:
            own = data.annToMask(item).astype(bool)
            assert own.sum() == item["area"]
            whole |= own
        np.testing.assert_array_equal(whole, result.mask)
    assert len(data.loadAnns(data.getAnnIds(imgIds=images["cut/000.png"]["id"]))) == 2


def test_coco_needs_an_end(bundle: Path, frames: Path, tmp_path: Path) -> None:
    done = run(bundle, frames, "--watch", "--coco", tmp_path / "x.json")
    assert done.exit_code == 2
    assert "does not end" in done.output


# --- maps ---


def test_maps_laid_out_like_the_sources(bundle: Path, frames: Path, tmp_path: Path) -> None:
    run(bundle, frames, "-r", "--maps", tmp_path / "maps")
    for name in ("cut/000", "cut/001", "good/000"):
        found = tifffile.imread(tmp_path / "maps" / f"{name}.tiff")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected(bundle, frames / f"{name}.png").anomaly_map)


def test_maps_as_the_evaluation_scripts_take_them(bundle: Path, frames: Path, tmp_path: Path) -> None:
    """MVTec AD and LOCO: <maps>/<object>/test/<defect>/<image>.tiff, real numbers at the image's size."""
    run(bundle, frames / "cut", frames / "good", "--maps", tmp_path / "maps", "--map-format", "mvtec")
    tree = {path.relative_to(tmp_path / "maps").as_posix() for path in (tmp_path / "maps").rglob("*.*")}
    assert tree == {f"{CATEGORY}/test/{name}.tiff" for name in ("cut/000", "cut/001", "good/000")}
    found = tifffile.imread(tmp_path / "maps" / CATEGORY / "test" / "cut" / "001.tiff")
    np.testing.assert_array_equal(found, expected(bundle, frames / "cut" / "001.png").anomaly_map)


def test_maps_as_the_server_of_mvtec_ad_2_takes_them(bundle: Path, tmp_path: Path) -> None:
    """float16 of one channel, and masks of 0 and 255, in two trees that hold nothing else."""
    split = tmp_path / "data" / CATEGORY / "test_private"
    save_png(split / "000_regular.png", gray_frame(spot=SPOT))
    save_png(split / "001_regular.png", gray_frame())
    run(bundle, split, "--maps", tmp_path / "submission", "--map-format", "mvtec-ad-2")
    tree = {path.relative_to(tmp_path / "submission").as_posix() for path in (tmp_path / "submission").rglob("*.*")}
    place = f"{CATEGORY}/test_private"
    assert tree == {
        f"anomaly_images/{place}/000_regular.tiff",
        f"anomaly_images/{place}/001_regular.tiff",
        f"anomaly_images_thresholded/{place}/000_regular.png",
        f"anomaly_images_thresholded/{place}/001_regular.png",
    }
    result = expected(bundle, split / "000_regular.png")
    found = tifffile.imread(tmp_path / "submission" / "anomaly_images" / place / "000_regular.tiff")
    assert (found.dtype, found.ndim) == (np.float16, 2)
    np.testing.assert_array_equal(found, result.anomaly_map.astype(np.float16))
    mask = np.asarray(Image.open(tmp_path / "submission" / "anomaly_images_thresholded" / place / "000_regular.png"))
    np.testing.assert_array_equal(mask, 255 * result.mask.astype(np.uint8))
    assert result.mask.any()


@pytest.mark.parametrize("kind", ["mvtec", "mvtec-ad-2"])
def test_a_frame_from_elsewhere_has_no_place_in_a_benchmark(bundle: Path, tmp_path: Path, kind: str) -> None:
    save_png(tmp_path / "elsewhere" / "a.png", gray_frame())
    done = run(bundle, tmp_path / "elsewhere", "--maps", tmp_path / "maps", "--map-format", kind)
    assert done.exit_code == 2
    assert f"below a folder named {CATEGORY}" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--csv", "x.png"), "not the name"),
        (("--coco", "x.csv"), "not the name"),
        (("--map-format", "mvtec"), "--maps is missing"),
        (("--maps", "m", "--map-format", "png"), "not known"),
    ],
)
def test_options_that_cannot_work(bundle: Path, frames: Path, words: tuple[str, ...], said: str) -> None:
    done = run(bundle, frames, *words)
    assert done.exit_code == 2
    assert said in done.output


def test_maps_do_not_go_where_frames_come_from(bundle: Path, frames: Path) -> None:
    done = run(bundle, frames, "-r", "--maps", frames / "maps")
    assert done.exit_code == 2
    assert "lies in the source" in done.output
