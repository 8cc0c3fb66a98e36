"""The pictures that saae-run writes: whose they are, where they lie, and that no verdict waits for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saae_run import run
from tiny_bundle import gray_frame

from saae_runtime import files
from saae_runtime.cli import outputs, sink
from saae_runtime.images import read_image
from saae_runtime.render import heatmap, save_png

pytestmark = pytest.mark.needs("onnxruntime")


def test_pictures_are_those_of_the_result(bundle: Path, frames: Path, tmp_path: Path) -> None:
    from saae_runtime import Engine

    out = tmp_path / "pictures"
    done = run(bundle, frames, "--out", out, "--heatmaps", "--masks", "--sheets", "--json", "-")
    names = {f"{stem}.{kind}.png" for stem in "abcd" for kind in ("heatmap", "mask", "sheet")}
    assert {path.name for path in out.iterdir()} == names
    record = json.loads(done.stdout.splitlines()[3])
    assert record["pictures"]["mask"] == str(out / "d.mask.png")
    with Engine(bundle) as engine:
        result = engine(read_image(frames / "d.png"))
    np.testing.assert_array_equal(
        read_image(out / "d.heatmap.png"), heatmap(result.anomaly_map, result.threshold), strict=True
    )
    np.testing.assert_array_equal(np.asarray(Image.open(out / "d.mask.png")) > 0, result.mask)


def test_pictures_of_defects_alone(bundle: Path, frames: Path, tmp_path: Path) -> None:
    run(bundle, frames, "--out", tmp_path / "p", "--defects-only")
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        f"{stem}.{kind}.png" for stem in "bd" for kind in ("heatmap", "overlay")
    }


def test_folders_keep_their_layout_in_the_pictures(bundle: Path, frames: Path, tmp_path: Path) -> None:
    shutil.copytree(frames, frames / "night")
    run(bundle, frames, "--recursive", "--out", tmp_path / "p", "--masks")
    assert (tmp_path / "p" / "night" / "b.mask.png").is_file()
    assert len(list((tmp_path / "p").rglob("*.png"))) == 8


def test_full_disk_under_the_pictures_leaves_them_out_and_goes_on_judging(
    bundle: Path, frames: Path, tmp_path: Path, monkeypatch
) -> None:
    write, calls = outputs.render.save_png, []

    def fill(path, picture) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise files.storage_error(Path(path), OSError(28, "No space left on device"))
        write(path, picture)

    monkeypatch.setattr(outputs.render, "save_png", fill)
    done = run(bundle, frames, "--out", tmp_path / "p", "--masks", "--json", tmp_path / "r.jsonl")
    assert done.exit_code == 1
    assert done.stderr.count("disk is full") == 1
    assert "4 frames: 2 clean, 2 defective" in done.stderr
    assert "2 pictures left out" in done.stderr  # the one that failed, and the one behind it
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["is_anomalous"] for record in records] == [False, True, False, True]
    assert "pictures" not in records[3]
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"a.mask.png", "b.mask.png"}


def test_pictures_are_tried_again_after_a_while(bundle: Path, frames: Path, tmp_path: Path, monkeypatch) -> None:
    write, calls = outputs.render.save_png, []

    def once(path, picture) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise files.storage_error(Path(path), OSError(28, "No space left on device"))
        write(path, picture)

    monkeypatch.setattr(outputs.render, "save_png", once)
    monkeypatch.setattr(sink, "_PAUSE", 0.0)
    done = run(bundle, frames, "--out", tmp_path / "p", "--masks")
    assert "1 picture left out" in done.stderr
    assert len(list((tmp_path / "p").iterdir())) == 3


def test_the_verdict_comes_before_its_pictures(bundle: Path, frames: Path, tmp_path: Path, monkeypatch) -> None:
    target, seen = tmp_path / "r.jsonl", []
    monkeypatch.setattr(
        outputs.render, "save_png", lambda path, picture: seen.append(len(target.read_text().splitlines()))
    )
    run(bundle, frames, "--out", tmp_path / "p", "--masks", "--json", target)
    assert seen == [1, 2, 3, 4]


def test_pictures_inside_a_source_pattern_are_refused(bundle: Path, frames: Path, tmp_path: Path) -> None:
    save_png(frames / "night" / "e.png", gray_frame())
    for pattern, out in (("**/*.png", "out"), ("*/*", "out"), ("*.png", "."), ("**/*.png", "deep/er")):
        done = run(bundle, frames / pattern, frames / "a.png", "--out", frames / out)
        assert done.exit_code == 2, (pattern, out)
        assert "as if it were a frame" in " ".join(done.stderr.split())
    for pattern, out in (("*.png", frames / "out"), ("**/?.png", frames / "out"), ("**/*.png", tmp_path / "out")):
        assert run(bundle, frames / pattern, "--out", out, "--limit", 2).exit_code == 1


@pytest.mark.parametrize("length", [230, 240, 250])
def test_long_names_keep_their_pictures_and_the_frames_behind_them(bundle: Path, tmp_path: Path, length: int) -> None:
    names = ["m" * length + end for end in ("a", "b")]
    for name in (*names, "z"):
        save_png(tmp_path / "f" / f"{name}.png", gray_frame())
    out = tmp_path / "p"
    done = run(bundle, tmp_path / "f", "--out", out, "--heatmaps", "--masks", "--json", "-")
    assert done.exit_code == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 3
    written = {path for record in records for path in record["pictures"].values()}
    assert written == {str(path) for path in out.iterdir()}
    assert len(written) == 6
