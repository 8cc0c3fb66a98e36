"""saae-run as a person and as a pipe see it: exit codes, JSON lines, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from needs import need
from PIL import Image
from repeated_options import repeatable
from saae_run import SPOT, run
from tiny_bundle import gray_frame

from saae_runtime import files
from saae_runtime.appending import LineFile
from saae_runtime.bundle import open_bundle, update_bundle
from saae_runtime.cli import command as cli
from saae_runtime.cli.log import JsonLines
from saae_runtime.cli.outputs import Standard
from saae_runtime.engine import Engine
from saae_runtime.images import read_image
from saae_runtime.render import save_png, sheet
from saae_runtime.thresholds import ThresholdTable

pytestmark = pytest.mark.needs("onnxruntime")


def auto(bundle: Path) -> str:
    """The backend that `auto` takes on this machine."""
    with Engine(bundle) as engine:
        return engine.backend.name


def test_defect_gives_1_and_a_line_per_frame(bundle: Path, frames: Path) -> None:
    done = run(bundle, frames)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["clean", "defect", "clean", "defect"]
    assert lines[1].endswith(str(frames / "b.png"))
    assert "4 frames: 2 clean, 2 defective, 0 unreadable" in done.stderr
    assert "frames/s" in done.stderr
    assert "median" in done.stderr
    assert f"{auto(bundle)} (auto" in done.stderr


def test_clean_gives_0(bundle: Path, clean: Path) -> None:
    assert run(bundle, clean).exit_code == 0


def test_unreadable_among_clean_gives_3_and_the_rest_goes_on(bundle: Path, clean: Path) -> None:
    (clean / "b.png").write_bytes((clean / "a.png").read_bytes()[:50])
    done = run(bundle, clean)
    assert done.exit_code == 3
    assert len(done.stdout.splitlines()) == 2
    assert "b.png" in done.stderr
    assert "try:" in done.stderr
    assert "2 clean, 0 defective, 1 unreadable" in done.stderr


def test_defect_outranks_unreadable(bundle: Path, frames: Path) -> None:
    (frames / "z.png").write_bytes(b"")
    assert run(bundle, frames).exit_code == 1


def test_nothing_readable_is_not_clean(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "only.png").write_bytes(b"no image")
    assert run(bundle, tmp_path / "only.png").exit_code == 3


@pytest.mark.parametrize("batch", [1, 3])
def test_json_lines_hold_the_results_of_the_engine(bundle: Path, frames: Path, batch: int) -> None:
    from saae_runtime import Engine

    (frames / "bb.png").write_bytes(b"\x89PNG")
    done = run(bundle, frames, "--json", "-", "--batch", batch, "--threads", 1)
    assert done.exit_code == 1
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(record["source"]).name for record in records] == ["a.png", "b.png", "bb.png", "c.png", "d.png"]
    with Engine(bundle, threads=1) as engine:
        for record in records:
            assert record["frame"] == 0
            if "error" in record:
                assert set(record["error"]) == {"type", "what", "why", "try"}
                assert record["error"]["type"] == "ImageError"
                continue
            result = engine(read_image(record["source"]))
            assert record["score"] == pytest.approx(result.score)
            assert record["is_anomalous"] == result.is_anomalous
            assert record["threshold"] == result.threshold
            assert record["regions"] == [region.to_dict() for region in result.regions()]
            assert record["ms"] > 0
    assert sum("error" in record for record in records) == 1
    assert "bb.png" in done.stderr


def test_json_file_and_lines_for_a_person_are_two_things(bundle: Path, frames: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.jsonl"
    done = run(bundle, frames, "--json", target)
    assert done.stdout == ""
    assert [json.loads(line)["is_anomalous"] for line in target.read_text().splitlines()] == [False, True, False, True]


def test_thresholds_at_run_time(bundle: Path, frames: Path) -> None:
    assert run(bundle, frames, "--image-threshold", 200).exit_code == 0
    low = run(bundle, frames / "a.png", "--image-threshold", -1, "--threshold", 7, "--json", "-")
    record = json.loads(low.stdout)
    assert (record["image_threshold"], record["threshold"]) == (-1, 7)
    assert low.exit_code == 1
    rate = json.loads(run(bundle, frames / "a.png", "--fpr", 0, "--image-fpr", 0.01, "--json", "-").stdout)
    assert (rate["threshold"], rate["image_threshold"]) == (60, 20)


def test_min_area_leaves_small_regions_out(bundle: Path, frames: Path) -> None:
    (all_,) = map(json.loads, run(bundle, frames / "b.png", "--json", "-").stdout.splitlines())
    (none,) = map(json.loads, run(bundle, frames / "b.png", "--json", "-", "--min-area", 5000).stdout.splitlines())
    assert len(all_["regions"]) == 1
    assert none["regions"] == []


def test_limit(bundle: Path, frames: Path) -> None:
    done = run(bundle, frames, "--limit", 1)
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1


def test_quiet_says_nothing_but_errors(bundle: Path, clean: Path) -> None:
    done = run(bundle, clean, "--quiet")
    assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)
    (clean / "b.png").write_bytes(b"")
    assert "b.png" in run(bundle, clean, "-q").stderr


def test_explain_lists_the_backends(bundle: Path, clean: Path) -> None:
    said = run(bundle, clean, "--explain").stderr
    assert f"* {auto(bundle)}: in use" in said
    assert "onnxruntime:cpu" in said
    assert "* onnxruntime:cpu: in use" in run(bundle, clean, "--explain", "--backend", "onnxruntime:cpu").stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{none}", "{frames}"], "{none}"),
        (["{bundle}", "{frames}/nothing.png"], "nothing.png"),
        (["{bundle}", "{frames}", "--backend", "onnxrutime"], "did you mean onnxruntime"),
        (["{bundle}", "{frames}", "--backend", "tensorrt"], "tensorrt"),
        (["{bundle}", "{frames}", "--precision", "fp16"], "fp16"),
        (["{bundle}", "{frames}", "--fpr", "0.1", "--threshold", "3"], "both given"),
        (["{bundle}", "{frames}", "--image-fpr", "7"], "from 0 to 1"),
        (["{bundle}", "{frames}", "--heatmaps"], "--out"),
        (["{bundle}", "{frames}", "--out", "{frames}"], "next run"),
        (["{bundle}", "{frames}", "--recursive", "--out", "{frames}/p"], "next run"),
        (["{bundle}", "{frames}", "--out", "{frames}/a.png"], "not a folder"),
        (["{bundle}", "{frames}", "--out", "{none}.parquet", "--heatmaps"], "--parquet {none}.parquet --out DIR"),
        (["{bundle}", "{frames}", "--out", "{none}.csv", "--defects-only"], "--csv {none}.csv --out DIR"),
        (["{bundle}", "{frames}", "--out", "{none}.csv", "--csv", "{none}2.csv"], "the same option"),
        (["{bundle}", "{frames}", "--out", "{none}.jsonl", "--json", "-"], "the same option"),
        (["{bundle}", "{frames}", "--out", "{none}.json"], "--coco {none}.json"),
        (["{bundle}", "{frames}", "--watch", "--out", "{none}.parquet"], "--watch does not end"),
        (["{bundle}", "{frames}", "--watch", "--ray"], "--ray is for image files"),
        (["{bundle}", "{frames}", "--ray-address", "local", "--batch", "2"], "--ray and --batch"),
        (["{bundle}", "{frames}", "--json", "{frames}/a.png"], "image or a video"),
        (["{bundle}", "{frames}", "--batch", "0"], "--batch"),
        (["{bundle}"], "SOURCE"),
    ],
)
def test_usage_and_bundle_errors_give_2_and_touch_nothing(
    bundle: Path, frames: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    places = {"bundle": str(bundle), "frames": str(frames), "none": str(tmp_path / "none")}
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert word.format(**places) in " ".join(done.stderr.split())
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_bundle_with_one_byte_changed_gives_2(bundle: Path, frames: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    done = run(copy, frames, "--json", tmp_path / "results.jsonl")
    assert done.exit_code == 2
    assert "model.onnx" in done.stderr
    assert not (tmp_path / "results.jsonl").exists()


class Full:
    """A file on a disk that is full from the nth write on; a few bytes still fit."""

    def __init__(self, file, left: int) -> None:
        self.file = file
        self.left = left

    def write(self, data) -> int:
        self.left -= 1
        if self.left >= 0:
            return self.file.write(data)
        if len(data) > 3 and self.left == -1:
            return self.file.write(data[:3])
        raise OSError(28, "No space left on device")

    def truncate(self, size: int) -> None:
        self.file.truncate(size)

    def close(self) -> None:
        self.file.close()


def test_full_disk_under_the_json_keeps_whole_lines(tmp_path: Path) -> None:
    target = tmp_path / "r.jsonl"
    lines = JsonLines(str(target))
    assert lines._file is not None
    lines._file._file = Full(lines._file._file, 1)
    lines.write({"a": 1})
    with pytest.raises(files.StorageError, match="disk is full"):
        lines.write({"b": 2})
    lines._file._file = lines._file._file.file  # room again
    lines.write({"c": 3})
    lines.close()
    assert target.read_text() == '{"a": 1}\n{"c": 3}\n'


@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
@pytest.mark.parametrize("room", [0, 5])
def test_full_disk_under_standard_output_takes_back_this_line_alone(tmp_path: Path, flags: int, room: int) -> None:
    target = tmp_path / "results.jsonl"
    target.write_bytes(b"yesterday\n" * 10)
    number = os.open(target, os.O_WRONLY | flags)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not flags:
            os.lseek(number, 0, os.SEEK_END)
        standard = Standard(sys.stdout, number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 + room, old[1]))
        try:
            for _ in range(2):
                with pytest.raises(files.StorageError):
                    standard.write(b"lost today\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        standard.write(b"today\n")
    finally:
        os.close(number)
    assert target.read_bytes() == b"yesterday\n" * 10 + b"today\n"


def test_full_disk_under_the_json_goes_on_judging_and_exits_4(
    bundle: Path, frames: Path, tmp_path: Path, monkeypatch
) -> None:
    real = LineFile._open

    def fills(self, overwrite: bool) -> None:
        real(self, overwrite)
        self._file = Full(self._file, 1)

    monkeypatch.setattr(LineFile, "_open", fills)
    target = tmp_path / "r.jsonl"
    done = run(bundle, frames, "--json", target, "--out", tmp_path / "p", "--masks")
    assert done.exit_code == 4
    assert done.stderr.count("disk is full") == 1
    assert "3 verdicts could not be written" in done.stderr
    assert "4 frames: 2 clean, 2 defective" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["defect", "clean", "defect"]
    assert len(list((tmp_path / "p").iterdir())) == 4
    assert [json.loads(line)["is_anomalous"] for line in target.read_text().splitlines()] == [False]
    monkeypatch.undo()
    # What has no verdict is not taken for scored.
    assert run(bundle, frames, "--json", target, "--skip-scored").exit_code == 1
    assert len(target.read_text().splitlines()) == 4


def test_names_with_escape_codes_and_markup_are_shown_not_obeyed(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "[bold]\x1b[31mred.png"
    save_png(path, gray_frame())
    done = run(bundle, path)
    assert "\x1b" not in done.stdout
    assert "[bold]\\x1b[31mred.png" in done.stdout
    path.write_bytes(b"")
    done = run(bundle, path)
    assert "\x1b" not in done.stderr
    assert "[bold]\\x1b[31mred.png" in done.stderr.replace("\n", "")


def test_video(bundle: Path, tmp_path: Path) -> None:
    av = need("av")
    path = tmp_path / "line.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(5):
            picture = gray_frame(spot=SPOT if index == 3 else None)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    done = run(bundle, path, "--json", "-", "--out", tmp_path / "p", "--defects-only", "--overlays")
    assert done.exit_code == 1
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["frame"], record["is_anomalous"]) for record in records] == [
        (index, index == 3) for index in range(5)
    ]
    assert [path.name for path in (tmp_path / "p" / "line").iterdir()] == ["000003.overlay.png"]


def test_help_and_version() -> None:
    assert run("--help").exit_code == 0
    assert "camera:0" in run("--help").stdout


def test_defect_of_saae_itself_is_not_taken_for_a_defective_product(bundle: Path, clean: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "find_sources", broken)
    monkeypatch.setattr(sys, "argv", ["saae-run", str(bundle), str(clean)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_no_option_can_be_repeated() -> None:
    assert repeatable(cli.app) == {"": set()}


@pytest.mark.parametrize("watch", [False, True])
def test_white_level_of_twelve_bit_files(bundle: Path, tmp_path: Path, watch: bool) -> None:
    gray = gray_frame(spot=SPOT)[:, :, 0]
    folder = tmp_path / "twelve"
    folder.mkdir()
    Image.fromarray(np.ceil(gray * (4095 / 255)).astype(np.uint16)).save(folder / "a.png")
    arguments = [
        bundle,
        folder,
        "--backend",
        "onnxruntime:cpu",
        "--json",
        tmp_path / "r.jsonl",
        "--white-level",
        "4095",
    ]
    arguments += ["--watch", "--limit", "1"] if watch else []
    assert run(*arguments).exit_code == 1
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    with Engine(bundle, backend="onnxruntime:cpu") as engine:
        assert json.loads(line)["score"] == pytest.approx(engine(gray).score)


def test_every_result_says_what_decided_and_where_it_ranks(bundle: Path, frames: Path, tmp_path: Path) -> None:
    done = run(bundle, frames, "--json", "-", "--out", tmp_path / "p", "--sheets")
    clean, defect, *_ = map(json.loads, done.stdout.splitlines())
    assert clean["reason"] == "clean: image score 0 is not above the image threshold 40"
    assert defect["reason"].startswith("defective: image score 127 is above the image threshold 40")
    assert (clean["rank"], defect["rank"]) == (0.0, 1.0)
    with Engine(bundle) as engine:
        for name, record in (("a", clean), ("b", defect)):
            picture = read_image(frames / f"{name}.png")
            found = engine(picture)
            title = f"{name}   {record['reason']}"
            drawn = sheet(picture, found.anomaly_map, found.mask, found.threshold, title=title)
            np.testing.assert_array_equal(read_image(tmp_path / "p" / f"{name}.sheet.png"), drawn)


def test_a_rate_that_the_calibration_cannot_tell_from_0_is_said(bundle: Path, frames: Path) -> None:
    said = run(bundle, frames, "--image-fpr", "1e-7", "--fpr", "1e-8").stderr
    assert "--image-fpr 1e-07: the thresholds rest on 1000000 normal images" in said
    assert "cannot be told from 0" in said
    assert "--fpr 1e-08" in said
    assert "cannot be told" not in run(bundle, frames, "--image-fpr", "1e-6", "--fpr", "0").stderr


def test_an_estimate_holds_for_rates_below_one_image(bundle: Path, frames: Path, tmp_path: Path) -> None:
    """Its thresholds go on rising below 1/count, so nothing else is in force, and nothing is said."""
    made = open_bundle(bundle)
    tables = made.manifest.thresholds["fp32"]
    image = ThresholdTable.estimated([30.0 + number / 10 for number in range(60)], 0.05)
    thresholds = {**made.manifest.thresholds, "fp32": dataclasses.replace(tables, image=image)}
    update_bundle(made, dataclasses.replace(made.manifest, thresholds=thresholds), {}, target=tmp_path / "estimated")
    done = run(tmp_path / "estimated", frames, "--image-fpr", "0.001", "--backend", "onnxruntime:cpu", "--json", "-")
    assert "cannot be told" not in done.stderr
    used = json.loads(done.stdout.splitlines()[0])["image_threshold"]
    assert image.at(0.01) < used < image.at(0.0)


def test_the_limit_in_pixels_can_be_raised(bundle: Path, frames: Path, monkeypatch) -> None:
    monkeypatch.setenv("SAAE_MAX_PIXELS", "")
    done = run(bundle, frames / "a.png", "--max-pixels", 100)
    assert done.exit_code == 3
    assert "SAAE_MAX_PIXELS=6144" in done.stderr
    assert run(bundle, frames / "a.png", "--max-pixels", 6144).exit_code == 0
