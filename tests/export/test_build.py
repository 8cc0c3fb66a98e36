"""The whole road, from a folder of images to a verified bundle, and everything that can stop it on the way."""

from __future__ import annotations

import copy
import dataclasses
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `cpu`")

import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_builds import copy_tree, draw, leftovers, options, quiet_build  # noqa: E402

import saae_export.build as build_module  # noqa: E402
from saae_export.build import BuildResult  # noqa: E402
from saae_export.sources import Request  # noqa: E402
from saae_export.torch_reference import TorchReference  # noqa: E402
from saae_runtime import Bundle, Engine, open_bundle  # noqa: E402
from saae_runtime.errors import ConfigError, DataError, ParityError, SaaeError, StorageError  # noqa: E402
from saae_runtime.geometry import gaussian_matrix, upsample_map  # noqa: E402
from saae_runtime.images import read_image  # noqa: E402
from saae_train.checkpoint import load_checkpoint  # noqa: E402
from saae_train.data import find_category  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, str, Path]:
    folder = tmp_path_factory.mktemp("built")
    result, text = quiet_build(options(data, folder, measure_latency=True))
    return result, text, folder


@pytest.fixture(scope="module")
def at_model_size(built: tuple[BuildResult, str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same fitted model with its graph left at the model's size."""
    folder = tmp_path_factory.mktemp("model-size")
    chosen = options(data, folder, checkpoint=_checkpoint(built[2]), frame_size="model", precisions=("fp32",))
    return quiet_build(chosen)[0].bundle


@pytest.fixture
def again(built: tuple[BuildResult, str, Path], tmp_path: Path) -> Path:
    """A folder with everything a first build left: bundle, fitted model, features."""
    return copy_tree(built[2], tmp_path / "again")


def _checkpoint(folder: Path) -> Path:
    found = sorted((folder / "runs" / "weave" / "checkpoint").iterdir())
    assert len(found) == 1
    return found[0]


def test_the_bundle_is_complete(built: tuple[BuildResult, str, Path]) -> None:
    result, text, folder = built
    bundle = open_bundle(folder / "bundle", verify=True)
    manifest = bundle.manifest
    assert manifest.category == "weave"
    assert not manifest.synthetic
    assert (manifest.frame.height, manifest.frame.width, manifest.frame.baked) == (96, 80, True)
    assert set(manifest.files) >= {"model.onnx", "model.fp16.onnx", "report.html", "reference/reference.json"}
    assert any(name.startswith("heatmaps/") for name in manifest.files)
    assert [item.parity.passed for item in manifest.artefacts if item.parity] == [True, True]
    assert manifest.calibration.held_out
    assert 0 <= manifest.metrics["pixel_roc_auc"] <= 1
    assert manifest.model.config["steps"] == 6
    assert {row.precision for row in result.latency} == {"fp32", "fp16"}
    for number in range(1, 11):
        assert f"{number}/10 " in text
    assert leftovers(folder) == []
    assert not (folder / "runs" / "weave" / "staged").exists()


def test_thresholds_are_those_of_the_deployed_graph(built: tuple[BuildResult, str, Path], data: Path) -> None:
    result, _, folder = built
    held_out = set(load_checkpoint(_checkpoint(folder)).facts["held_out"])
    train = [sample for sample in find_category(data, "weave").train if sample.path.name in held_out]
    assert len(train) == result.bundle.manifest.calibration.images
    for precision in ("fp32", "fp16"):
        with Engine(result.bundle, backend="onnxruntime:cpu", precision=precision, fpr=0.0) as engine:
            results = [engine(read_image(sample.path)) for sample in train]
            assert not any(found.is_anomalous for found in results)
            assert not any(found.mask.any() for found in results)
            assert max(float(found.anomaly_map.max()) for found in results) == pytest.approx(engine.threshold, rel=1e-6)
            assert max(found.score for found in results) == pytest.approx(engine.image_threshold, rel=1e-6)


def test_the_graphs_default_is_the_calibrated_threshold(built: tuple[BuildResult, str, Path]) -> None:
    onnx = pytest.importorskip("onnx")
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
    detector = load_checkpoint(_checkpoint(built[2])).detector
    smooth = [torch.tensor(gaussian_matrix(side, detector.smoothing)) for side in detector.backbone.grid]
    sizes = [(80, 96)] if kind == "own size" else [(80, 96), (120, 131), (64, 64), (50, 300)]
    verdicts = set()
    bundle = built[0].bundle if kind == "own size" else at_model_size
    with Engine(bundle, backend="onnxruntime:cpu", precision=precision) as engine:
        for number, sample in enumerate(find_category(data, "weave").test):
            path = tmp_path / f"{number}.jpg"
            Image.fromarray(read_image(sample.path)).resize(sizes[number % len(sizes)]).save(path, quality=90)
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
    assert verdicts, "every score lay too near the threshold to tell"


def test_building_again_reuses_the_model_and_replaces_the_bundle(again: Path, data: Path) -> None:
    before = open_bundle(again / "bundle").manifest
    weights = (_checkpoint(again) / "model.safetensors").stat().st_mtime_ns
    _, text = quiet_build(options(data, again, precisions=("fp32",)))
    assert "reused" in text
    assert (_checkpoint(again) / "model.safetensors").stat().st_mtime_ns == weights
    after = open_bundle(again / "bundle").manifest
    assert after.precisions() == ("fp32",)
    assert after.thresholds["fp32"] == before.thresholds["fp32"]
    assert after.files["model.onnx"] == before.files["model.onnx"], "the same model gave other bytes"


class _Enough(Exception):
    """Ends a build once it has come to what a test is about."""


@pytest.fixture
def until_export(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Builds end before the export (it takes seconds); the list gets the frame sizes that it was asked for."""
    sizes: list[object] = []

    def end(checkpoint: object, folder: object, frame_size: object, *_: object) -> None:
        sizes.append(frame_size)
        raise _Enough

    monkeypatch.setattr(build_module, "export_graphs", end)
    return sizes


def test_another_configuration_is_fitted_anew(again: Path, data: Path, until_export: list[object]) -> None:
    chosen = options(data, again)
    config = dataclasses.replace(chosen.config, steps=7)
    with pytest.raises(_Enough):
        quiet_build(dataclasses.replace(chosen, config=config))
    assert len(list((again / "runs" / "weave" / "checkpoint").iterdir())) == 2


def test_a_damaged_model_is_fitted_again(again: Path, data: Path, until_export: list[object]) -> None:
    file = _checkpoint(again) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] + b"damaged")
    with pytest.raises(_Enough):
        quiet_build(options(data, again))
    load_checkpoint(_checkpoint(again))
    assert file.read_bytes() == whole, "the same images, options and seed gave another model"


def test_parity_is_a_gate(again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is not the model's: nothing is written, what was fitted is kept."""
    manifest = (again / "bundle" / "manifest.json").read_bytes()

    class Perturbed(TorchReference):
        def __init__(self, detector: object, frame_size: tuple[int, int]) -> None:
            other = copy.deepcopy(detector)
            other.saae.decoder.convs[2].bias.data.add_(0.5)  # type: ignore[attr-defined]
            super().__init__(other, frame_size)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "TorchReference", Perturbed)
    with pytest.raises(ParityError, match=r"model\.onnx") as caught:
        quiet_build(options(data, again, precisions=("fp32",)))
    assert caught.value.exit_code == 3
    assert "pixel (" in caught.value.why
    assert (again / "bundle" / "manifest.json").read_bytes() == manifest
    load_checkpoint(_checkpoint(again))
    assert leftovers(again) == []


STOPS = {
    "find images": "find_images",
    "check images": "check",
    "fit": "fit",
    "export": "export_graphs",
    "calibrate": "calibrate",
    "parity": "artefact_parity",
    "evaluate": "evaluate",
    "reference frames": "write_reference",
    "heatmaps": "write_heatmaps",
    "report": "write_report",
}


@pytest.mark.parametrize("stage", STOPS)
def test_ctrl_c_at_every_stage_is_clean(stage: str, again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(again / "bundle").manifest

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, STOPS[stage], stop)
    with pytest.raises(KeyboardInterrupt):
        quiet_build(options(data, again, precisions=("fp32",), refit=stage == "fit"))
    assert open_bundle(again / "bundle", verify=True).manifest == before
    assert leftovers(again) == []
    assert not (again / "runs" / "weave" / "staged").exists()
    load_checkpoint(_checkpoint(again))


def test_a_full_disk_keeps_the_old_bundle(again: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_bundle(again / "bundle").manifest
    copyfile = shutil.copyfile

    def full(source: Path, target: Path, **keywords: object) -> object:
        if ".bundle." in str(target):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copyfile(source, target, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="disk is full"):
        quiet_build(options(data, again, precisions=("fp32",)))
    assert open_bundle(again / "bundle", verify=True).manifest == before
    assert leftovers(again) == []


def test_a_folder_that_is_no_bundle_is_refused_before_the_work(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "holiday.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a bundle"):
        quiet_build(options(data, tmp_path))
    assert not (tmp_path / "runs" / "weave").exists()
    assert (tmp_path / "bundle" / "holiday.txt").read_text() == "mine"


def test_bad_images_are_listed_before_any_fitting(data: Path, tmp_path: Path) -> None:
    broken = copy_tree(data, tmp_path / "data")
    good = sorted((broken / "weave" / "train" / "good").iterdir())
    good[0].write_bytes(good[0].read_bytes()[:200])
    good[1].write_bytes(b"")
    with pytest.raises(DataError) as caught:
        quiet_build(options(broken, tmp_path))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "runs").exists()


def test_too_few_images(data: Path, tmp_path: Path) -> None:
    few = copy_tree(data, tmp_path / "data")
    for path in sorted((few / "weave" / "train" / "good").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="too few"):
        quiet_build(options(few, tmp_path))


def test_free_folders_without_defects_at_the_models_size(data: Path, tmp_path: Path) -> None:
    request = Request("mine", normal=data / "weave" / "train" / "good")
    chosen = options(data, tmp_path, request=request, frame_size="model", precisions=("fp32",))
    result, text = quiet_build(chosen)
    manifest = result.bundle.manifest
    assert manifest.category == "mine"
    assert (manifest.frame.height, manifest.frame.width, manifest.frame.baked) == (64, 64, False)
    assert result.evaluation is None
    assert manifest.metrics == {}
    assert "no defect images" in text
    frame = read_image(next((data / "weave" / "train" / "good").iterdir()))
    with Engine(result.bundle) as engine:
        assert engine(frame).anomaly_map.shape == frame.shape[:2]


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
    with pytest.raises(_Enough):
        quiet_build(options(images, tmp_path, frame_size=asked))
    assert until_export == [expected]


def test_a_fitted_model_can_be_given(built: tuple[BuildResult, str, Path], at_model_size: Bundle) -> None:
    ours, first = at_model_size.manifest, built[0].bundle.manifest
    assert ours.backbone == first.backbone
    assert ours.model == first.model
    assert (ours.frame.baked, first.frame.baked) == (False, True)


def test_a_checkpoint_with_nan_is_refused(built: tuple[BuildResult, str, Path], data: Path, tmp_path: Path) -> None:
    from saae_train.checkpoint import load_checkpoint, save_checkpoint

    found = load_checkpoint(_checkpoint(built[2]))
    found.detector.saae.project.bias.data[0] = float("nan")
    bad = save_checkpoint(tmp_path / "bad", found)
    with pytest.raises(SaaeError, match=r"NaN|not finite"):
        quiet_build(options(data, tmp_path, checkpoint=bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precisions": ("int4",)}, "int4"),
        ({"precisions": ()}, "nothing"),
        ({"frame_size": "big"}, "big"),
        ({"frame_size": "0x10"}, "0x10"),
        ({"parity_images": 0}, "at least one"),
    ],
)
def test_options_that_cannot_work(data: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quiet_build(options(data, tmp_path, **changes))
