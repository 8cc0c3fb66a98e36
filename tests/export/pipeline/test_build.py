"""From a folder of images to a verified bundle: what is in it, its thresholds, its gates and its options."""

from __future__ import annotations

import copy
import dataclasses
import html
import io
import itertools
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import copy_tree, leftovers
from needs import need
from PIL import Image
from rich.console import Console
from tiny_builds import CONFIG, Enough, fitted_model, options, quiet_build

import saae_export.pipeline.build as build_module
import saae_export.pipeline.graphs as graphs_module
from saae_export.fitted import read_fitted
from saae_export.parity.pytorch import TorchReference
from saae_export.pipeline.build import BuildResult, build
from saae_export.pipeline.images import Request
from saae_runtime import Bundle, Engine, open_bundle
from saae_runtime.backends import timing
from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.backends.openvino.library import device_missing
from saae_runtime.errors import (
    ConfigError,
    ParityError,
)
from saae_runtime.estimate import ScoreModel
from saae_runtime.geometry import gaussian_matrix, upsample_map
from saae_runtime.images import read_image
from saae_runtime.thresholds import MARGIN
from saae_train.calibrate import left_out_scores
from saae_train.cli.model import open_model, thresholds
from saae_train.data.category import find_category
from saae_train.data.split import content_hashes, split_held_out, split_of
from saae_train.model.checkpoint import load_checkpoint


def test_the_bundle_is_complete(built: tuple[BuildResult, str, Path]) -> None:
    result, text, folder = built
    bundle = open_bundle(folder / "bundle", verify=True)
    manifest = bundle.manifest
    assert manifest.category == "weave"
    assert not manifest.synthetic
    assert (manifest.frame.height, manifest.frame.width, manifest.frame.baked) == (96, 80, True)
    assert set(manifest.files) >= {"model.onnx", "model.fp16.onnx", "report.html", "reference/reference.json"}
    assert any(name.startswith("heatmaps/") for name in manifest.files)
    assert all(item.parity is not None and item.parity.passed for item in manifest.artefacts)
    # bf16 is the FP32 graph again, where the processor has it.
    assert [name for name in manifest.precisions() if name != "bf16"] == ["fp32", "fp16"]
    assert manifest.calibration.left_out
    assert read_fitted(bundle) == set(content_hashes(result.category.train))
    assert manifest.calibration.images == 10
    assert 0 <= manifest.metrics["pixel_roc_auc"] <= 1
    assert manifest.model.config["steps"] == 6
    assert {row.precision for row in result.latency} - {"bf16"} == {"fp32", "fp16"}
    stages = 12 if bf16_missing() else 13  # the verdicts in bf16
    for number in range(1, stages + 1):
        assert f"{number}/{stages} " in text
    report = bundle.file("report.html").read_text(encoding="utf-8")
    assert "thresholds computed with" in report
    with Engine(bundle) as engine:
        assert f"test images with {engine.backend.name} {engine.backend.precision}" in text
        assert html.escape(engine.backend.description) in report
    assert leftovers(folder) == []
    assert [path.name for path in (folder / "runs" / "weave").iterdir()] == ["models"]


def test_thresholds_are_those_of_images_that_are_left_out(built: tuple[BuildResult, str, Path]) -> None:
    result, _, folder = built
    checkpoint = load_checkpoint(fitted_model(folder))
    assert checkpoint.left_out is not None
    frame = result.bundle.manifest.frame
    scores = left_out_scores(checkpoint.left_out, checkpoint.detector.smoothing, (frame.height, frame.width))
    expected = ScoreModel.fit(scores)
    for precision, bound in (("fp32", 1e-4), ("fp16", 2e-2)):
        with Engine(result.bundle, backend="onnxruntime:cpu", precision=precision) as engine:
            tables = engine.manifest.thresholds[precision]
            assert (tables.image.rule, tables.image.count) == ("log-normal", 10)
            assert engine.image_threshold == pytest.approx(expected.threshold(0.05), rel=bound)


def test_a_checkpoint_is_judged_by_the_thresholds_of_its_bundle(built: tuple[BuildResult, str, Path]) -> None:
    """At the images' own size, at which it is scored, and not at the model's."""
    result, _, folder = built
    with ExitStack() as stack:
        model = open_model(fitted_model(folder), "auto", stack)
        split = split_of(model.checkpoint.record, model.checkpoint.config, result.category)
        _, image, _ = thresholds(model, split, result.category.name)
    assert image == pytest.approx(result.bundle.manifest.thresholds["fp32"].image.at(), rel=1e-4)


def test_without_a_memory_thresholds_are_those_of_the_deployed_graph(
    held: tuple[BuildResult, Path], data: Path
) -> None:
    result, folder = held
    held_out = set(load_checkpoint(fitted_model(folder)).record.held_out)
    train = [sample for sample in find_category(data, "weave").train if sample.path.name in held_out]
    assert len(train) == result.bundle.manifest.calibration.images
    for precision in ("fp32", "fp16"):
        with Engine(result.bundle, backend="onnxruntime:cpu", precision=precision, fpr=0.0) as engine:
            results = [engine(read_image(sample.path)) for sample in train]
            assert not any(found.is_anomalous for found in results)
            assert not any(found.mask.any() for found in results)
            highest = max(float(found.anomaly_map.max()) for found in results)
            assert highest * (1 + MARGIN) == pytest.approx(engine.threshold, rel=1e-6)
            score = max(found.score for found in results)
            assert score * (1 + MARGIN) == pytest.approx(engine.image_threshold, rel=1e-6)


def test_the_graphs_default_is_the_calibrated_threshold(built: tuple[BuildResult, str, Path]) -> None:
    onnx = need("onnx")
    bundle = built[0].bundle
    for precision, name in (("fp32", "model.onnx"), ("fp16", "model.fp16.onnx")):
        graph = onnx.load(str(bundle.file(name))).graph
        default = next(onnx.numpy_helper.to_array(item) for item in graph.initializer if item.name == "threshold")
        assert default[0] == np.float32(bundle.manifest.thresholds[precision].pixel.at())


@pytest.mark.parametrize(
    ("kind", "precision", "bound"),
    [
        # Pillow rounds to 8 bits after its resize, the graph does not: that is what is left.
        ("own size", "fp32", 0.03),
        ("own size", "fp16", 0.03),
        # Here both resize with Pillow.
        ("model size", "fp32", 1e-4),
    ],
)
def test_the_same_jpegs_through_pytorch_and_the_bundle(
    built: tuple[BuildResult, str, Path],
    at_model_size: Bundle,
    data: Path,
    tmp_path: Path,
    kind: str,
    precision: str,
    bound: float,
) -> None:
    """PyTorch as in training (Pillow's resize, torch's upsample) against the deployed graph: maps, scores, verdicts."""
    detector = load_checkpoint(fitted_model(built[2])).detector
    smooth = [torch.tensor(gaussian_matrix(side, detector.smoothing)) for side in detector.backbone.grid]
    sizes = [(80, 96)] if kind == "own size" else [(80, 96), (120, 131), (64, 64), (50, 300)]
    verdicts = set()
    bundle = built[0].bundle if kind == "own size" else at_model_size
    with Engine(bundle, backend="onnxruntime:cpu", precision=precision) as engine:
        for number, sample in enumerate(find_category(data, "weave").test):
            path = tmp_path / f"{number}.jpg"
            picture = Image.fromarray(read_image(sample.path)).resize(sizes[number % len(sizes)])
            if sample.is_anomalous and number % 2:  # beside the drawn defects one that random features see, too
                noise = np.random.default_rng(number).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
                width, height = picture.size
                patch = Image.fromarray(noise).resize((width // 2, height // 2), Image.Resampling.NEAREST)
                picture.paste(patch, (width // 4, height // 4))
            picture.save(path, quality=90)
            frame = read_image(path)
            found = engine(frame)
            pixels = np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR), np.float32)
            with torch.no_grad():
                scores = detector(torch.from_numpy(pixels).permute(2, 0, 1)[None])
                scores = smooth[0] @ scores @ smooth[1].T
                full = F.interpolate(scores[:, None], frame.shape[:2], mode="bilinear", align_corners=False)
                at_64 = F.interpolate(scores[:, None], (64, 64), mode="bilinear", align_corners=False)
            if kind == "model size":  # the map leaves the graph at its own size and is brought to the frame's
                full = torch.from_numpy(upsample_map(at_64[0, 0].numpy(), frame.shape[:2]))[None, None]
            expected = full[0, 0].numpy()
            assert np.abs(found.anomaly_map - expected).max() <= bound * expected.max()
            score = float((at_64 if kind == "model size" else full).max())
            assert found.score == pytest.approx(score, rel=bound)
            if abs(score - engine.image_threshold) > bound * engine.image_threshold:
                assert found.is_anomalous == (score > engine.image_threshold)
                verdicts.add(found.is_anomalous)
    assert verdicts == {True, False}, "normal and defective frames got one verdict, so agreeing on it says little"


def test_a_gpu_that_a_library_does_not_build_for_is_a_note(
    again: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(bundle: Bundle, *, library: str, **_: object) -> None:
        raise ConfigError(f"{library} does not support this GPU (sm90).", "It builds for sm86, sm89.", "")

    monkeypatch.setattr(graphs_module, "build_engine", refuses)
    result, text = quiet_build(options(data, again, precisions=("fp32",), engines=("auto",)))
    for library in ("tensorrt", "tensorrt-rtx"):
        assert f"no {library} engine: {library} does not support this GPU (sm90). It builds for sm86, sm89." in text
    assert {item.kind for item in result.bundle.manifest.artefacts} == {"onnx"}
    with pytest.raises(ConfigError, match="does not support this GPU"):
        quiet_build(options(data, again, precisions=("fp32",), engines=("tensorrt-rtx",)))


def test_parity_is_a_gate(again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is not the model's: nothing is written, what was fitted is kept."""
    manifest = (again / "bundle" / "manifest.json").read_bytes()

    class Perturbed(TorchReference):
        def __init__(self, detector: object, frame_size: tuple[int, int]) -> None:
            other = copy.deepcopy(detector)
            other.saae.decoder.convs[2].bias.data.add_(0.5)  # type: ignore[attr-defined]
            super().__init__(other, frame_size)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "TorchReference", Perturbed)
    console = Console(file=io.StringIO(), width=160, highlight=False)
    with pytest.raises(ParityError, match=r"model\.onnx") as caught:
        build(options(data, again, precisions=("fp32",)), console)
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue().partition("Parity: errors relative")[2]
    assert "model.onnx" in table
    assert "FAIL" in table
    assert caught.value.exit_code == 3
    assert "pixel (" in caught.value.why
    assert (again / "bundle" / "manifest.json").read_bytes() == manifest
    load_checkpoint(fitted_model(again))
    assert leftovers(again) == []


def test_a_build_times_its_backends_once_and_keeps_the_figures(
    again: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it judges with is what `auto` takes afterwards, on this machine and without timing anything."""
    if why := device_missing("CPU")[0]:
        pytest.skip(f"ONNX Runtime alone is no choice: {why}")
    monkeypatch.setenv("SAAE_MEASURE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    timed, real = [], timing.time_ways

    def counted(ways: Sequence[timing.Way], clock: timing.Clock) -> tuple[timing.Figure, ...]:
        timed.append([(way.backend, way.precision) for way in ways])
        rows = real(ways, itertools.count(0.0, 0.01).__next__)  # they run, under a clock of its own
        return tuple(dataclasses.replace(row, ms=10.0 - place) for place, row in enumerate(rows))  # the last one wins

    monkeypatch.setattr(timing, "_known", {})
    monkeypatch.setattr(timing, "time_ways", counted)
    result, text = quiet_build(options(data, again, precisions=("fp32",), measure_latency=True))
    (ways,) = timed
    name, precision = ways[-1]
    assert f"choose backend: {name} {precision} " in text
    assert f"test images with {name} {precision}" in text
    (kept,) = (again / "bundle.cache").rglob("speed-*.json")
    assert json.loads(kept.read_text())["rows"][-1]["backend"] == name
    monkeypatch.setattr(timing, "_known", {})
    with Engine(result.bundle) as engine:
        assert (engine.backend.name, engine.backend.precision) == (name, precision)
    assert len(timed) == 1


def test_free_folders_without_defects_at_the_models_size(data: Path, tmp_path: Path) -> None:
    request = Request("mine", normal=(data / "weave" / "train" / "good",))
    # With the MLP of a texture, so that the graph is the one that other tests have exported.
    chosen = {"config": CONFIG.replace(mlp_ratio=1), "frame_size": "model", "precisions": ("fp32",)}
    result, text = quiet_build(options(data, tmp_path, request=request, **chosen))
    manifest = result.bundle.manifest
    assert manifest.category == "mine"
    assert (manifest.frame.height, manifest.frame.width, manifest.frame.baked) == (64, 64, False)
    assert result.evaluation is None
    assert manifest.metrics == {}
    assert "no test images" in text
    frame = read_image(next((data / "weave" / "train" / "good").iterdir()))
    with Engine(result.bundle) as engine:
        assert engine(frame).anomaly_map.shape == frame.shape[:2]
    # Good test pictures alone are scored, too: what people want to know of them is the share of false alarms.
    good = data / "weave" / "test" / "good"
    request = Request("mine", normal=(data / "weave" / "train" / "good",), normal_test=(good,))
    result, text = quiet_build(options(data, tmp_path, request=request, **chosen))
    assert "reused" in text
    with Engine(result.bundle) as engine:
        rejected = sum(engine(read_image(path)).is_anomalous for path in good.iterdir())
    assert result.evaluation is not None
    assert len(result.evaluation.images) == 2
    assert result.bundle.manifest.metrics["image_fpr"] == rejected / 2
    assert f"{rejected} of 2" in text
    assert f"{rejected} of 2" in (result.where / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asked", "mixed", "expected"),
    [("auto", False, (96, 80)), ("auto", True, None), ("model", False, None), ("120x100", True, (120, 100))],
)
def test_the_frame_size_that_is_baked_in(
    data: Path, tmp_path: Path, until_export: list[object], asked: str, mixed: bool, expected: object
) -> None:
    images = copy_tree(data, tmp_path / "data")
    if mixed:
        odd = sorted((images / "weave" / "train" / "good").iterdir())[0]
        Image.open(odd).resize((70, 70)).save(odd)
    with pytest.raises(Enough):
        quiet_build(options(images, tmp_path, frame_size=asked))
    assert until_export == [expected]


def test_a_fitted_model_can_be_given(built: tuple[BuildResult, str, Path], at_model_size: Bundle) -> None:
    ours, first = at_model_size.manifest, built[0].bundle.manifest
    assert ours.backbone == first.backbone
    assert ours.model == first.model
    assert (ours.frame.baked, first.frame.baked) == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precisions": ("int4",)}, "int4"),
        ({"precisions": ()}, "nothing"),
        ({"frame_size": "big"}, "big"),
        ({"frame_size": "0x10"}, "0x10"),
        ({"parity_images": 0}, "at least one"),
        ({"self_test": True, "self_test_frames": 0}, "at least one frame"),
        ({"pixel_fpr": 1.5}, r"--fpr 1\.5"),
        ({"image_fpr": -0.1}, r"--image-fpr -0\.1"),
        ({"image_fpr": 1.0}, r"--image-fpr 1 is not possible"),
        ({"engines": ("tensort",)}, "no engine tensort"),
        ({"exclude": ("no_such_image.png",)}, r"--exclude no_such_image\.png matches no image"),
        ({"keep": ("no_such_image.png",)}, r"--keep no_such_image\.png matches no image"),
        ({"exclude": ("003.png",), "keep": ("00[2-4].png", "003.png")}, r"--keep 003\.png matches no image"),
    ],
)
def test_options_that_cannot_work(data: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quiet_build(options(data, tmp_path, **changes))
    assert not (tmp_path / "runs").exists()  # said before the work


def test_the_white_level_goes_from_the_fit_to_the_line(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    for path in (root / "weave").glob("t*/*/*.png"):
        gray = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(np.ceil(gray * (4095 / 255)).astype(np.uint16)).save(path)
    config = CONFIG.replace(white_level=4095, held_out=0.4)
    result, text = quiet_build(options(root, tmp_path, config=config, precisions=("fp32",)))
    assert "white level" not in text
    assert result.bundle.manifest.frame.white_level == 4095
    _, held_out = split_held_out(result.category.train, config.held_out, seed=config.seed)
    with Engine(result.where, backend="onnxruntime:cpu") as engine:
        scores = [engine(read_image(sample.path, engine.white_level)).score for sample in held_out]
        assert max(scores) < engine.image_threshold
        assert engine(read_image(held_out[0].path)).score != pytest.approx(scores[0], rel=1e-3)
    (model,) = (tmp_path / "runs/weave/models").iterdir()
    again = options(root, tmp_path, checkpoint=model, out=tmp_path / "again", precisions=("fp32",))
    assert quiet_build(again)[0].bundle.manifest.frame.white_level == 4095
    with pytest.raises(ConfigError, match="not what"):
        quiet_build(options(root, tmp_path, checkpoint=model, config=CONFIG.replace(white_level=1023)))
    unknown = options(root, tmp_path, out=tmp_path / "other", precisions=("fp32",))
    assert "--white-level 4095" in quiet_build(unknown)[1]
