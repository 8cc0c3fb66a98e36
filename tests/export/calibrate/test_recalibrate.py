"""A finished bundle calibrated again: T and what depends on it are computed anew, nothing else is changed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from folders import fingerprint, leftovers
from noisy_parts import SIZE, draw, frames
from onnx import numpy_helper
from rich.console import Console
from tiny_bundle import expected_map, make_tiny_bundle
from twelve_bits import WHITE, write_twice

import saae_export.calibrate.recalibrate as recalibrate_module
from saae_export.calibrate.images import about_images, find_images
from saae_export.calibrate.recalibrate import Recalibration, recalibrate
from saae_export.cli.inspect import bundle_view
from saae_export.fitted import write_fitted
from saae_export.parity.verify import verify
from saae_runtime import Engine
from saae_runtime.backends.openvino import bf16_missing, library
from saae_runtime.bundle import Bundle, open_bundle, update_bundle
from saae_runtime.errors import (
    BackendUnavailableError,
    BundleCorruptError,
    ConfigError,
    DataError,
    ParityError,
)
from saae_runtime.manifest import SCHEMA, Artefact, Parity
from saae_runtime.reference import ReferenceFrame, write_reference
from saae_runtime.thresholds import MARGIN, ThresholdTable
from saae_train.data.split import content_hashes

PARITY = Parity(8, 1e-5, 1e-6, 0, 1e-3, 1e-3, True, "a.png", "PyTorch FP32")


def default_in(path: Path) -> float:
    (tensor,) = [item for item in onnx.load(str(path)).graph.initializer if item.name == "threshold"]
    return float(numpy_helper.to_array(tensor)[0])


def with_reference(bundle: Bundle, off: float = 1.0) -> Bundle:
    """Two reference frames; `off` times the right answer in the second."""
    kept = []
    for number, level in enumerate((60, 200)):
        frame = np.full((*SIZE, 3), level, np.uint8)
        answer = expected_map(frame) * (off if number else 1.0)
        kept.append(ReferenceFrame(f"{number}.png", frame, answer.astype(np.float32), float(answer.max())))
    return update_bundle(bundle, bundle.manifest, lambda folder: write_reference(folder, kept, "numpy"))


def with_artefacts(bundle: Bundle, parity: Parity | None, *more: Artefact) -> Bundle:
    """Every artefact with this parity, and engines beside them, whose files no library reads."""
    artefacts = tuple(dataclasses.replace(item, parity=parity) for item in bundle.manifest.artefacts)
    manifest = dataclasses.replace(bundle.manifest, artefacts=(*artefacts, *more))
    return update_bundle(bundle, manifest, {item.file: b"engine" for item in more})


def engine_of(bundle: Bundle, source: str, parity: Parity | None, library: str = "tensorrt") -> Artefact:
    options = {"source": source, "source_sha256": bundle.sha256(source), "workspace": 64}
    precision = "fp16" if "fp16" in source else "fp32"
    return Artefact(
        f"{library}-{precision}.engine", "engine", precision, library, "10.3.0", "sm87", None, options, parity
    )


def again(bundle: Path, pictures: Path, **options: object) -> Recalibration:
    return recalibrate(bundle, find_images([str(pictures)]), **options)  # type: ignore[arg-type]


# --- the thresholds ---


@pytest.mark.parametrize("rate", [None, 0.0, 0.02])
def test_t_is_what_the_pictures_say(bundle: Path, pictures: Path, rate: float | None) -> None:
    maps = np.sort(np.concatenate([expected_map(frame).ravel() for frame in frames(pictures)]))[::-1]
    found = again(bundle, pictures, pixel_fpr=rate, image_fpr=rate)
    table = open_bundle(bundle).manifest.thresholds["fp32"]
    wanted = 0.001 if rate is None else rate  # the tiny bundle's default
    assert table.pixel.default_fpr == table.image.default_fpr == wanted
    assert table.pixel.count == maps.size
    assert table.image.count == 9
    expected = maps[int(wanted * maps.size)] * (1.0 if wanted else 1 + MARGIN)
    assert table.pixel.at() == pytest.approx(expected, rel=1e-5)
    assert table.image.at() == pytest.approx(maps[0] * (1 + MARGIN), rel=1e-5)  # 9 pictures tell no smaller rate from 0
    assert found.changes[0].after == table
    assert found.changes[0].before.pixel.at() == 40.0


def test_every_precision_in_its_own_arithmetic(bundle: Path, pictures: Path) -> None:
    found = again(bundle, pictures)
    tables = open_bundle(bundle).manifest.thresholds
    assert [item.precision for item in found.changes] == ["fp32", "fp16"]
    assert tables["fp32"] != tables["fp16"]
    for precision, table in tables.items():
        with Engine(bundle, backend="onnxruntime:cpu", precision=precision) as engine:
            scores = [engine(frame).score for frame in frames(pictures)]
            assert engine.threshold == table.pixel.at()
        assert table.image.at(0.0) == pytest.approx(max(scores) * (1 + MARGIN), rel=1e-9)
        assert not any(score > table.image.at() for score in scores)


def test_the_old_t_is_counted_on_the_new_pictures(bundle: Path, tmp_path: Path) -> None:
    draw(tmp_path / "mixed", 3, level=60)  # |60 - 128| is above 40
    for path in draw(tmp_path / "mild", 4, level=115).iterdir():
        path.rename(tmp_path / "mixed" / f"mild-{path.name}")
    maps = [expected_map(frame) for frame in frames(tmp_path / "mixed")]
    change = again(bundle, tmp_path / "mixed", dry_run=True).changes[0]
    assert change.rejected_before == 3
    assert change.rejected_after == 0
    assert change.marked_before == pytest.approx(np.mean([(item > 40.0).mean() for item in maps]))
    assert change.scores == pytest.approx([item.max() for item in maps], rel=1e-5)


def test_pictures_of_other_sizes_count_as_the_engine_sees_them(bundle: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "large", 3, size=(100, 130))
    with Engine(bundle, backend="onnxruntime:cpu", precision="fp32") as engine:
        maps = [engine(frame).anomaly_map for frame in frames(folder)]
    table = again(bundle, folder).changes[0].after
    assert table.pixel.count == 3 * 100 * 130
    assert table.pixel.at(0.0) == pytest.approx(max(float(item.max()) for item in maps) * (1 + MARGIN), rel=1e-6)


# --- what rests on T ---


def test_pictures_of_a_twelve_bit_camera_count_at_the_bundles_white_level(bundle: Path, tmp_path: Path) -> None:
    grays = [np.random.default_rng(seed).integers(40, 90, SIZE, np.uint8) for seed in range(5)]
    plain, deep = write_twice(grays, tmp_path)
    wanted = again(bundle, plain, target=tmp_path / "other")
    opened = open_bundle(bundle)
    frame = dataclasses.replace(opened.manifest.frame, white_level=WHITE)
    update_bundle(opened, dataclasses.replace(opened.manifest, frame=frame), {})
    found = again(bundle, deep)
    assert [item.after for item in found.changes] == [item.after for item in wanted.changes]
    assert [item.scores for item in found.changes] == [item.scores for item in wanted.changes]
    assert open_bundle(bundle).manifest.frame.white_level == WHITE
    assert not any("white level" in note for note in found.notes)


def test_graphs_have_the_new_default_and_nothing_else_changes(bundle: Path, pictures: Path) -> None:
    before = {name: (bundle / name).read_bytes() for name in ("model.onnx", "model.fp16.onnx")}
    again(bundle, pictures)
    opened = open_bundle(bundle, verify=True)
    for name, precision in (("model.onnx", "fp32"), ("model.fp16.onnx", "fp16")):
        limit = np.float32(opened.manifest.thresholds[precision].pixel.at())
        assert default_in(bundle / name) == limit
        after = (bundle / name).read_bytes()
        assert sum(a != b for a, b in zip(before[name], after, strict=True)) <= 4
        session = ort.InferenceSession(str(bundle / name), providers=["CPUExecutionProvider"])
        anomaly_map, mask = session.run(["anomaly_map", "mask"], {"frame": frames(pictures)[0][None]})
        assert np.array_equal(mask.astype(bool), anomaly_map > limit)


def test_the_record_says_that_the_pictures_came_later(bundle: Path, pictures: Path) -> None:
    text = (bundle / "manifest.json").read_text().replace(f'"schema": {SCHEMA}', '"schema": 1')
    text = text.replace(',\n    "given_later": false', "")
    (bundle / "manifest.json").write_text(text)
    assert open_bundle(bundle).manifest.schema == 1
    again(bundle, pictures)
    opened = open_bundle(bundle)
    calibration = opened.manifest.calibration
    assert opened.manifest.schema == SCHEMA
    assert (calibration.images, calibration.given_later, calibration.held_out) == (9, True, None)
    first = calibration.digest
    draw(pictures, 3, seed=5)
    again(bundle, pictures)
    assert open_bundle(bundle).manifest.calibration.digest != first
    console = Console(width=160)
    with console.capture() as shown:
        console.print(bundle_view(opened))
    assert "9 normal images given after the build" in shown.get()
    assert "held-out" not in shown.get()


def test_numbers_counted_at_the_old_t_go_and_the_report_says_so(bundle: Path, pictures: Path) -> None:
    opened = open_bundle(bundle)
    metrics = {
        "label": "test set",
        "pixel_roc_auc": 0.98,
        "image_fpr": 0.1,
        "pixel_tpr": 0.9,
        "self_test": {"found": 3},
    }
    page = "<html><body><header><h1>tiny</h1></header><p>T</p></body></html>"
    manifest = dataclasses.replace(opened.manifest, metrics=metrics)
    update_bundle(opened, manifest, {"report.html": page.encode(), "heatmaps/a.png": b"picture"})
    again(bundle, pictures)
    again(bundle, pictures)
    after = open_bundle(bundle, verify=True)
    assert after.manifest.metrics == {"label": "test set", "pixel_roc_auc": 0.98}
    text = after.file("report.html").read_text()
    assert text.count("saae-export calibrate") == 1  # though it was calibrated twice
    assert text.startswith("<html><body><header><h1>tiny</h1></header>")
    assert text.endswith("<p>T</p></body></html>")
    assert after.file("heatmaps/a.png").read_bytes() == b"picture"


def test_parity_is_compared_again_at_the_new_t(bundle: Path, pictures: Path) -> None:
    with_artefacts(with_reference(open_bundle(bundle)), PARITY)
    found = again(bundle, pictures)
    assert [report.artefact for report in found.parity] == ["model.onnx", "model.fp16.onnx"]
    for item in open_bundle(bundle).manifest.artefacts:
        assert item.parity is not None
        assert (item.parity.images, item.parity.passed, item.parity.reference) == (
            2,
            True,
            "numpy, stored in the bundle",
        )
    assert all(report.passed for report in verify(bundle, backend="onnxruntime:cpu").reports)


def test_an_artefact_that_disagrees_leaves_the_bundle_as_it_was(bundle: Path, pictures: Path) -> None:
    with_artefacts(with_reference(open_bundle(bundle), off=1.1), PARITY)
    before = fingerprint(bundle)
    with pytest.raises(ParityError, match=r"model\.onnx"):
        again(bundle, pictures)
    assert fingerprint(bundle) == before
    assert leftovers(bundle.parent) == []


def test_without_frames_to_compare_parity_is_open_again(bundle: Path, pictures: Path) -> None:
    with_artefacts(open_bundle(bundle), PARITY)
    again(bundle, pictures)
    assert [item.parity for item in open_bundle(bundle).manifest.artefacts] == [None, None]


def test_engines_share_the_thresholds_and_keep_their_bytes(bundle: Path, pictures: Path) -> None:
    opened = open_bundle(bundle)
    failed = dataclasses.replace(PARITY, passed=False, flips=2)
    good = engine_of(opened, "model.fp16.onnx", PARITY)
    bad = engine_of(opened, "model.onnx", failed, "tensorrt_rtx")
    with_artefacts(with_reference(opened), PARITY, good, bad)
    again(bundle, pictures)
    after = open_bundle(bundle, verify=True)
    (first,) = after.artefacts(library="tensorrt")
    (second,) = after.artefacts(library="tensorrt_rtx")
    assert first.parity is None  # made for another machine: `verify` compares it there
    assert second.parity == failed
    assert first.options == {**good.options, "source_sha256": after.sha256("model.fp16.onnx")}
    assert second.options["source_sha256"] == after.sha256("model.onnx") != bad.options["source_sha256"]
    assert after.file(first.file).read_bytes() == b"engine"


# --- precisions that are not calibrated ---


def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        library, "device_missing", lambda kind: ("the package openvino is not installed", "pip install it")
    )


def test_a_precision_that_cannot_run_here_is_an_error_with_its_reason(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_openvino(monkeypatch)
    bundle = make_tiny_bundle(tmp_path / "bundle", SIZE, precisions=("fp32", "bf16"))
    before = fingerprint(bundle)
    with pytest.raises(BackendUnavailableError) as caught:
        again(bundle, pictures)
    assert caught.value.why == "bf16: the package openvino is not installed"
    assert "--precision fp32:" in caught.value.cure
    assert fingerprint(bundle) == before


def test_a_precision_left_out_leaves_the_bundle(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_openvino(monkeypatch)
    bundle = make_tiny_bundle(tmp_path / "bundle", SIZE, precisions=("fp32", "fp16", "bf16"))
    opened = open_bundle(bundle)
    with_artefacts(opened, None, engine_of(opened, "model.fp16.onnx", PARITY))
    found = again(bundle, pictures, precisions=["fp32"])
    assert found.dropped == ("fp16 (model.fp16.onnx, tensorrt-fp16.engine)", "bf16")
    after = open_bundle(bundle, verify=True)
    assert list(after.manifest.thresholds) == ["fp32"]
    assert after.manifest.precisions() == ("fp32",)
    assert set(after.manifest.files) == {"model.onnx"}
    with Engine(bundle) as engine:
        assert engine.backend.precision == "fp32"


def test_a_file_of_bf16_alone_keeps_its_own_t(tmp_path: Path, pictures: Path) -> None:
    if why := bf16_missing():
        pytest.skip(why)
    bundle = make_tiny_bundle(tmp_path / "bundle", SIZE, precisions=("fp32", "bf16"))
    again(bundle, pictures)
    tables = open_bundle(bundle).manifest.thresholds
    assert default_in(bundle / "model.onnx") == np.float32(tables["fp32"].pixel.at())
    again(bundle, pictures, precisions=["bf16"])
    tables = open_bundle(bundle).manifest.thresholds
    assert list(tables) == ["bf16"]
    assert default_in(bundle / "model.onnx") == np.float32(tables["bf16"].pixel.at())


def test_where_no_graph_runs_an_engine_of_the_precision_does(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Jetson: TensorRT and no ONNX Runtime. Its engine is played by the graph that it would be compiled from."""
    opened = open_bundle(bundle)
    with_artefacts(with_reference(opened), PARITY, engine_of(opened, "model.fp16.onnx", None))

    def on_a_jetson(found: Bundle, artefact: Artefact) -> Engine:
        if artefact.kind == "onnx":
            raise BackendUnavailableError("The backend cannot be used here.", "ONNX Runtime is not installed")
        played = Artefact("model.fp16.onnx", "onnx", artefact.precision)
        return Engine(found.only(played), backend="onnxruntime:cpu", precision="fp16", verify=False)

    monkeypatch.setattr(recalibrate_module, "open_artefact", on_a_jetson)
    with pytest.raises(BackendUnavailableError) as caught:
        again(bundle, pictures)
    assert caught.value.why == "fp32: ONNX Runtime is not installed"
    found = again(bundle, pictures, precisions=["fp16"])
    assert [item.precision for item in found.changes] == ["fp16"]
    assert [report.artefact for report in found.parity] == ["tensorrt-fp16.engine"]
    after = open_bundle(bundle, verify=True)
    (engine,) = after.artefacts(kind="engine")
    assert engine.parity is not None
    assert engine.parity.passed
    assert default_in(bundle / "model.fp16.onnx") == np.float32(after.manifest.thresholds["fp16"].pixel.at())


# --- what cannot work, and what is left alone ---


def test_a_dry_run_finds_the_same_and_writes_nothing(bundle: Path, pictures: Path) -> None:
    with_reference(open_bundle(bundle))
    before = fingerprint(bundle.parent)
    shown = again(bundle, pictures, dry_run=True)
    assert fingerprint(bundle.parent) == before
    assert shown.bundle.manifest.thresholds["fp32"].pixel.at() == 40.0
    assert again(bundle, pictures).changes == shown.changes


def test_another_folder_leaves_the_bundle_as_it_is(
    bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(bundle)
    found = again(bundle, pictures, target=tmp_path / "new")
    assert fingerprint(bundle) == before
    assert found.bundle.path == (tmp_path / "new").resolve()
    assert open_bundle(tmp_path / "new", verify=True).manifest.thresholds["fp32"] == found.changes[0].after
    monkeypatch.setattr(recalibrate_module, "open_artefact", lambda *_: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match="not a bundle"):
        again(bundle, pictures, target=pictures)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"precisions": ["int8"]}, "int8"),
        ({"precisions": []}, "precision"),
        ({"pixel_fpr": 1.5}, "1.5"),
        ({"image_fpr": -0.1}, "-0.1"),
        ({"image_fpr": 1.0}, "1 is not possible"),
        ({"pixel_fpr": float("nan")}, "nan is not possible"),
    ],
)
def test_options_that_cannot_work(bundle: Path, pictures: Path, options: dict[str, object], word: str) -> None:
    before = fingerprint(bundle)
    with pytest.raises(ConfigError) as caught:
        again(bundle, pictures, **options)
    assert word in caught.value.what
    assert caught.value.cure
    assert fingerprint(bundle) == before


def test_unreadable_pictures_are_all_named_before_anything_runs(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "3.png").write_bytes(b"")
    (pictures / "5.png").write_bytes((pictures / "6.png").read_bytes()[:200])
    monkeypatch.setattr(recalibrate_module, "open_artefact", lambda *_: pytest.fail("it was started"))
    with pytest.raises(DataError) as caught:
        again(bundle, pictures)
    assert [Path(line.partition(": ")[0]).name for line in caught.value.problems] == ["3.png", "5.png"]


def test_copies_of_one_picture_are_one(bundle: Path, pictures: Path) -> None:
    for index in range(1, 9):
        shutil.copyfile(pictures / "0.png", pictures / f"{index}.png")
    with pytest.raises(DataError, match="on 1 different image"):
        again(bundle, pictures)


def test_a_damaged_bundle_is_refused(bundle: Path, pictures: Path) -> None:
    (bundle / "model.fp16.onnx").write_bytes((bundle / "model.fp16.onnx").read_bytes()[:-1])
    with pytest.raises(BundleCorruptError, match="truncated"):
        again(bundle, pictures)


def test_notes_say_what_few_pictures_mean_and_where_t_comes_from(bundle: Path, pictures: Path) -> None:
    scores = [expected_map(frame).max() for frame in frames(pictures)]
    highest = sorted(pictures.iterdir())[int(np.argmax(scores))]
    below, rests, further = again(bundle, pictures, image_fpr=0.05, dry_run=True).notes
    assert "0.05 cannot be told from 0 with 9 images" in below
    assert str(highest) in rests
    assert "up to 1 in 10 further good parts" in further
    assert again(bundle, pictures, image_fpr=0.5, dry_run=True).notes == ()


def test_no_threshold_rests_on_pictures_in_the_memory(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    hashes = content_hashes(find_images([str(pictures)]))
    opened = open_bundle(bundle)
    write_fitted(tmp_path, hashes[:4])
    update_bundle(opened, opened.manifest, {"fitted.json": tmp_path / "fitted.json"})
    found = again(bundle, pictures)
    assert len(found.samples) == found.bundle.manifest.calibration.images == 5
    assert set(content_hashes(found.samples)) == set(hashes[4:])
    assert found.notes[0].startswith("4 of the 9 images are in the model's memory")
    assert len(again(bundle, pictures).samples) == 5  # the bundle still knows

    write_fitted(tmp_path, hashes)
    update_bundle(opened, opened.manifest, {"fitted.json": tmp_path / "fitted.json"}, target=tmp_path / "b")
    with pytest.raises(DataError, match="fitted on all of these images"):
        again(tmp_path / "b", pictures)


def test_no_picture_alone_decides_an_estimated_threshold(pictures: Path) -> None:
    scores = [1.0 + 0.01 * number for number in range(8)] + [6.0]
    table = ThresholdTable.estimated(scores, 0.05)
    assert table.at() < 6.0
    assert about_images(find_images([str(pictures)]), scores, table) == ()


def test_excluded_pictures_do_not_count(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures)
    left = find_images([str(pictures)], ["3.png", str(pictures / "5.png")])
    assert sorted(sample.path.name for sample in left) == [f"{number}.png" for number in (0, 1, 2, 4, 6, 7, 8)]
    with pytest.raises(ConfigError, match=r"33\.png is none of the images"):
        find_images([str(pictures)], ["33.png"])
    with pytest.raises(DataError, match="No image is left"):
        find_images(["3.png"], ["3.png"])


def test_pictures_by_file_folder_and_pattern_each_once(pictures: Path) -> None:
    draw(pictures / "deeper", 2)
    names = [str(pictures / "1.png"), str(pictures), str(pictures / "deeper" / ".." / "*.png")]
    found = [str(sample.path.relative_to(pictures)) for sample in find_images(names)]
    assert sorted(found) == [f"{n}.png" for n in range(9)] + ["deeper/0.png", "deeper/1.png"]
    assert found[0] == "1.png"
    for name in ("line.mp4", "camera:0"):
        with pytest.raises(ConfigError, match="images"):
            find_images([name])
