"""`verify` and `inspect` on a real bundle, whole and damaged."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from twelve_bits import WHITE, write_twice
from typer.testing import CliRunner

import saae_export.parity.verify as verify_module
from saae_export.calibrate.images import find_images
from saae_export.calibrate.recalibrate import recalibrate
from saae_export.cli.command import app
from saae_export.cli.inspect import bundle_view
from saae_export.graph.fused import FusedGraph
from saae_export.graph.onnx_file import export_onnx
from saae_export.parity.compare import require
from saae_export.parity.verify import verify
from saae_export.pipeline.build import BuildResult
from saae_export.pipeline.latency import measure
from saae_export.pipeline.report import write_heatmaps
from saae_export.report.data import Example
from saae_runtime import Engine, backends
from saae_runtime.backends.base import RawOutputs
from saae_runtime.backends.onnxruntime import backend as ort_backend
from saae_runtime.backends.onnxruntime import choose as ort_choose
from saae_runtime.backends.openvino import choose as openvino_choose
from saae_runtime.backends.openvino import library as openvino_library
from saae_runtime.bundle import Bundle, open_bundle, update_bundle, write_bundle
from saae_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    BundleCorruptError,
    BundleNotFoundError,
    CheckpointError,
    ConfigError,
    DeviceError,
    ParityError,
)
from saae_runtime.images import read_image
from saae_runtime.reference import ReferenceFrame, read_reference, write_reference
from saae_train.evaluation.ranking import METRIC_NAMES
from saae_train.model.checkpoint import load_checkpoint


@pytest.fixture
def bundle(built: tuple[BuildResult, str, Path], tmp_path: Path) -> Bundle:
    """A copy that a test may change."""
    source = open_bundle(built[2] / "bundle")
    files = {name: source.file(name) for name in source.manifest.files}
    return write_bundle(tmp_path / "bundle", source.manifest, files)


def _checkpoint(built: tuple[BuildResult, str, Path]) -> Path:
    return next((built[2] / "runs" / "weave" / "models").iterdir())


def test_a_fresh_bundle_verifies_from_its_own_frames(bundle: Bundle) -> None:
    found = verify(bundle.path, backend="onnxruntime:cpu")
    assert {report.precision for report in found.reports} == {"fp32", "fp16"}
    assert all(report.passed for report in found.reports)
    assert all("stored in the bundle" in report.against for report in found.reports)
    # 16-bit maps: an error of zero would mean that nothing was compared.
    assert 0 < found.reports[0].map_error < 1e-4
    require(found.reports)


def test_it_needs_neither_torch_nor_onnx(bundle: Bundle) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'onnx', 'scipy', 'saae_train'): sys.modules[name] = None\n"
        "from saae_export.parity.verify import verify\n"
        "found = verify(sys.argv[1], backend='onnxruntime:cpu')\n"
        "assert len(found.reports) == 2 and all(report.passed for report in found.reports)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle.path)], check=True, timeout=120)


_READ_ONLY = """
import os, sys
folder = sys.argv[1]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate",
           "os.utime", "tempfile.mkstemp", "tempfile.mkdtemp")

def refuse(event, arguments):
    # Permission bits do not bind root, and this test may be run as root.
    if event in CHANGES or (event == "open" and arguments[2] & WRITES):
        for name in arguments[:2]:
            if isinstance(name, (str, bytes)) and os.path.abspath(os.fsdecode(name)).startswith(folder):
                raise PermissionError(13, "read-only", os.fsdecode(name))

sys.addaudithook(refuse)
for attempt in (lambda: open(folder + "/new", "w"), lambda: os.mkdir(folder + ".cache")):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("the folder could be written to")
from saae_export.parity.verify import verify
from saae_runtime import Engine
from saae_runtime.reference import read_reference
with Engine(folder) as engine:
    frame = read_reference(engine.bundle)[0][0].frame
    assert engine(frame).score > 0
    assert len(list(engine.stream([frame, frame]))) == 2
found = verify(folder)
assert found.reports and all(report.passed for report in found.reports)
"""


def test_a_read_only_bundle_opens_scores_and_verifies(bundle: Bundle) -> None:
    def tree() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(bundle.path.parent.rglob("*"))}

    folders = [bundle.path.parent, bundle.path, *(path for path in bundle.path.rglob("*") if path.is_dir())]
    files = [path for path in bundle.path.rglob("*") if path.is_file()]
    try:
        for path in files:
            path.chmod(0o444)
        for path in folders:
            path.chmod(0o555)
        before = tree()
        command = [sys.executable, "-c", _READ_ONLY, str(bundle.path.resolve())]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert found.returncode == 0, found.stderr
        assert tree() == before
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.mark.parametrize("only", [None, "openvino"])
def test_what_no_processor_feature_lets_run_is_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, only: str | None
) -> None:
    if why := openvino_library.device_missing("CPU")[0]:
        pytest.skip(why)
    monkeypatch.setattr(openvino_choose, "has_bf16", lambda device: False)
    manifest = bundle.manifest
    bf16 = dataclasses.replace(bundle.artefacts(precision="fp32")[0], precision="bf16", parity=None)
    thresholds = {**manifest.thresholds, "bf16": manifest.thresholds["fp32"]}
    changed = dataclasses.replace(manifest, artefacts=(*manifest.artefacts, bf16), thresholds=thresholds)
    found = verify(update_bundle(bundle, changed, {}).path, backend=only)
    assert found.reports
    assert {item.name: item.why for item in found.skipped}["model.onnx bf16"].startswith("only OpenVINO computes in")


def test_against_pytorch_on_images(bundle: Bundle, built: tuple[BuildResult, str, Path], data: Path) -> None:
    found = verify(
        bundle.path,
        data=data / "weave" / "test",
        checkpoint=_checkpoint(built),
        backend="onnxruntime:cpu",
        most_images=3,
    )
    assert [len(report.images) for report in found.reports] == [3, 3]
    assert all(report.passed and report.against == "PyTorch FP32" for report in found.reports)


def test_images_of_a_twelve_bit_camera_are_compared_at_the_bundles_white_level(bundle: Bundle, tmp_path: Path) -> None:
    height, width = bundle.manifest.frame.height, bundle.manifest.frame.width
    grays = [np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8) for seed in range(2)]
    plain, deep = write_twice(grays, tmp_path)
    wanted = verify(bundle.path, data=plain, backend="onnxruntime:cpu").reports
    frame = dataclasses.replace(bundle.manifest.frame, white_level=WHITE)
    update_bundle(bundle, dataclasses.replace(bundle.manifest, frame=frame), {})
    found = verify(bundle.path, data=deep, backend="onnxruntime:cpu").reports
    assert [report.images for report in found] == [report.images for report in wanted]  # pixel values among them


def test_against_the_fp32_graph_on_images(bundle: Bundle, data: Path) -> None:
    found = verify(bundle.path, data=data / "weave" / "test", backend="onnxruntime:cpu", most_images=2)
    assert [report.precision for report in found.reports] == ["fp16"]
    assert 0 < found.reports[0].map_error < 0.03
    assert any("reference itself" in item.why for item in found.skipped)


def test_another_models_graph_fails(bundle: Bundle, built: tuple[BuildResult, str, Path], tmp_path: Path) -> None:
    """Hashes are right (somebody rebuilt the manifest), the graph is not the one that was calibrated."""
    frame = bundle.manifest.frame
    detector = load_checkpoint(_checkpoint(built)).detector
    detector.saae.decoder.convs[2].bias.data.add_(0.5)
    graph = FusedGraph(detector, (frame.height, frame.width))
    swapped = update_bundle(bundle, bundle.manifest, {"model.onnx": export_onnx(graph, tmp_path / "other.onnx", 0.5)})
    found = verify(swapped.path, backend="onnxruntime:cpu")
    verdicts = {report.precision: report.passed for report in found.reports}
    assert verdicts == {"fp32": False, "fp16": True}
    with pytest.raises(ParityError, match=r"model\.onnx"):
        require(found.reports)


def test_a_graph_that_is_wrong_in_batches_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may have a session of its own for batches, which single frames never reach."""
    infer = ort_backend.OrtBackend.infer

    def in_batches(self: ort_backend.OrtBackend, frames: np.ndarray, threshold: float) -> RawOutputs:
        found = infer(self, frames, threshold)
        return found if len(frames) == 1 else dataclasses.replace(found, anomaly_map=found.anomaly_map * 2)

    monkeypatch.setattr(ort_backend.OrtBackend, "infer", in_batches)
    found = verify(bundle.path, backend="onnxruntime:cpu")
    assert [report.passed for report in found.reports] == [False] * 2
    assert found.reports[0].worst.batch == 8
    with pytest.raises(ParityError, match=r"model\.onnx .*disagrees"):
        require(found.reports)


@pytest.mark.parametrize("name", ["model.onnx", "samples/*", "report.html"])
def test_one_changed_byte_is_found(bundle: Bundle, name: str) -> None:
    file = sorted(bundle.path.glob(name))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleCorruptError, match="changed"):
        verify(bundle.path)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        verify(tmp_path / "nothing")


def test_a_checkpoint_of_another_build(bundle: Bundle, built: tuple[BuildResult, str, Path]) -> None:
    manifest = dataclasses.replace(
        bundle.manifest, backbone=dataclasses.replace(bundle.manifest.backbone, weights_sha256="0" * 64)
    )
    foreign = update_bundle(bundle, manifest, {})
    with pytest.raises(CheckpointError, match="is not what"):
        verify(foreign.path, checkpoint=_checkpoint(built))


def test_no_images_and_no_reference_frames(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        verify(bundle.path, data=tmp_path / "empty")
    without = tuple(name for name in bundle.manifest.files if name.startswith(("reference/", "samples/")))
    bare = update_bundle(bundle, bundle.manifest, {}, drop=without)
    with pytest.raises(ConfigError, match="no reference frames"):
        verify(bare.path)


def test_unknown_and_missing_backends(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="no backend"):
        verify(bundle.path, backend="onnxruntim")
    with pytest.raises((BackendError, ConfigError)):
        verify(bundle.path, backend="tensorrt")


@pytest.fixture
def gpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime-gpu reports beside a driver: providers that are only found missing when they are opened."""
    import onnxruntime

    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(ort_choose, "_has_nvidia_driver", lambda: True)
    monkeypatch.setattr(ort_choose, "load_tensorrt", lambda package: "")
    monkeypatch.setattr(openvino_library, "device_missing", lambda kind: ("not installed", "install it"))
    opened = ort_backend.OrtBackend._open

    def fails(self: ort_backend.OrtBackend, *arguments: object) -> object:
        if self.name != "onnxruntime:cpu":
            raise BackendUnavailableError(f"The backend {self.name} cannot be used here.", "libnvinfer is missing")
        return opened(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ort_backend.OrtBackend, "_open", fails)


@pytest.mark.usefixtures("gpu_wheel")
def test_a_provider_that_does_not_load_is_skipped_with_its_reason(bundle: Bundle) -> None:
    usable = {item.name for item in backends.candidates(bundle, 0, "fp32") if item.why_not is None}
    assert usable >= {"onnxruntime:tensorrt", "onnxruntime:cuda", "onnxruntime:cpu"}
    result = CliRunner().invoke(app, ["verify", str(bundle.path)], catch_exceptions=False)
    text = " ".join(result.output.split())
    assert result.exit_code == 0
    for precision in ("fp32", "fp16"):
        assert f"not run: onnxruntime:cuda {precision}: The backend onnxruntime:cuda cannot be used here." in text
    assert "libnvinfer is missing" in text
    assert "onnxruntime:tensorrt" not in text, "auto does not consider it"
    assert "2 comparisons" in text
    with pytest.raises(ConfigError, match="Nothing in") as caught:
        verify(bundle.path, backend="onnxruntime:tensorrt")
    assert "libnvinfer is missing" in caught.value.why


@pytest.mark.usefixtures("gpu_wheel")
def test_latency_leaves_out_what_does_not_load(bundle: Bundle) -> None:
    said: list[str] = []
    frame = np.zeros((96, 80, 3), np.uint8)
    rows = list(measure(bundle, [frame], runs=1, skipped=said.append))
    assert [(row.backend, row.precision) for row in rows] == [("onnxruntime:cpu", "fp32"), ("onnxruntime:cpu", "fp16")]
    assert [text.split()[0] for text in said] == ["onnxruntime:cuda"] * 2
    assert all("libnvinfer is missing" in text for text in said)


def test_a_device_lost_in_the_middle_is_skipped_and_not_finite_is_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Engine.__call__

    def losing(error: BackendError) -> object:
        def score(engine: Engine, frame: object) -> object:
            if engine.backend.precision == "fp16":
                raise error
            return whole(engine, frame)  # type: ignore[call-overload]

        return score

    monkeypatch.setattr(Engine, "__call__", losing(DeviceError("The device is lost.", "unplugged")))
    found = verify(bundle.path, backend="onnxruntime:cpu")
    assert [report.precision for report in found.reports] == ["fp32"]
    lost = [(item.name, item.why) for item in found.skipped if "bf16" not in item.name]  # bf16 is OpenVINO's alone
    assert lost == [("onnxruntime:cpu fp16", "The device is lost. unplugged")]
    monkeypatch.setattr(Engine, "__call__", losing(BackendError("a score that is not finite")))
    with pytest.raises(BackendError, match="not finite"):
        verify(bundle.path, backend="onnxruntime:cpu")


@pytest.mark.parametrize("flat", [False, True])
def test_reference_frames_survive_the_disk(bundle: Bundle, tmp_path: Path, flat: bool) -> None:
    rng = np.random.default_rng(0)
    anomaly_map = np.full((20, 30), 0.25, np.float32) if flat else rng.normal(5, 3, (20, 30)).astype(np.float32)
    frame = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    item = ReferenceFrame("a b/../ü.png", frame, anomaly_map, 7.25)
    without = tuple(name for name in bundle.manifest.files if name.startswith(("reference/", "samples/")))
    kept = update_bundle(bundle, bundle.manifest, lambda folder: write_reference(folder, [item], "me"), drop=without)
    (read,), against = read_reference(kept)
    assert (read.name, read.score, against) == (item.name, item.score, "me")
    assert np.array_equal(read.frame, frame)
    span = float(anomaly_map.max() - anomaly_map.min())
    assert np.abs(read.anomaly_map - anomaly_map).max() <= span / 131070 * 1.01 + 1e-6


def test_a_bundle_calibrated_again_is_whole(bundle: Bundle, data: Path) -> None:
    good = find_images([str(data / "weave" / "test" / "good"), str(data / "weave" / "train" / "good" / "00*.png")])
    found = recalibrate(bundle.path, good, precisions=["fp32", "fp16"])
    opened = open_bundle(bundle.path, verify=True)
    assert opened.manifest.calibration.given_later
    assert {item.precision for item in found.changes} == {"fp32", "fp16"} == set(opened.manifest.precisions())
    assert all(item.after != item.before for item in found.changes)
    assert "image_fpr" in bundle.manifest.metrics
    assert "image_fpr" not in opened.manifest.metrics
    assert opened.file("report.html").read_text().count('id="recalibrated"') == 1
    assert all(item.parity is not None and item.parity.passed for item in opened.manifest.artefacts)
    again = verify(bundle.path, backend="onnxruntime:cpu")
    assert len(again.reports) == 2
    assert all(report.passed for report in again.reports)
    with Engine(opened, backend="onnxruntime:cpu", precision="fp32") as engine:
        above = sum(engine(read_image(sample.path)).is_anomalous for sample in good)
        assert above <= len(good) // 4  # the threshold is an estimate of 5 in 100, no maximum


@pytest.mark.parametrize("damage", ["cut", "no image", "range", "infinite", "size", "no map"])
def test_a_damaged_reference_map_is_a_damaged_bundle(bundle: Bundle, damage: str) -> None:
    index = json.loads(bundle.file("reference/reference.json").read_text())
    entry = index["frames"][0]
    files: dict[str, bytes] = {}
    if damage == "cut":
        files[entry["map"]] = bundle.file(entry["map"]).read_bytes()[:60]
    elif damage == "no image":
        files[entry["map"]] = b"no image"
    elif damage == "range":
        entry["high"] = 10**400
    elif damage == "infinite":
        entry["high"] = 1e300
    elif damage == "size":
        entry["map"] = entry["frame"]
    else:
        entry["map"] = "reference/x" + "x" * 300
    files["reference/reference.json"] = json.dumps(index).encode()
    with pytest.raises(BundleCorruptError, match=r"reference\.json"):
        read_reference(update_bundle(bundle, bundle.manifest, files))


def test_a_reference_index_that_is_not_one(bundle: Bundle) -> None:
    broken = update_bundle(bundle, bundle.manifest, {"reference/reference.json": b'{"frames": 3}'})
    with pytest.raises(BundleCorruptError, match=r"reference\.json"):
        read_reference(broken)


def test_inspect_shows_what_a_person_asks_for(bundle: Bundle) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(bundle_view(bundle))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    manifest = bundle.manifest
    for expected in (
        "weave",
        "96 x 80",
        "model.fp16.onnx",
        "passed",
        "left out",
        manifest.backbone.name,
        f"{manifest.thresholds['fp32'].pixel.at():.5g}",
        manifest.files["model.onnx"].sha256[:16],
        "pixel ROC-AUC",
    ):
        assert expected in text, expected
    assert "demo images" not in text


def test_inspect_says_synthetic_and_not_compared(bundle: Bundle) -> None:
    artefacts = tuple(dataclasses.replace(item, parity=None) for item in bundle.manifest.artefacts)
    changed = update_bundle(bundle, dataclasses.replace(bundle.manifest, synthetic=True, artefacts=artefacts), {})
    console = Console(file=io.StringIO(), width=160)
    console.print(bundle_view(changed))
    assert isinstance(console.file, io.StringIO)
    assert "drawn demo images" in console.file.getvalue()
    assert "not checked" in console.file.getvalue()


def test_the_manifest_survives_json(bundle: Bundle) -> None:
    from saae_runtime.manifest import Manifest

    assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest


def test_inspect_names_every_metric_and_gives_rates_in_percent(bundle: Bundle) -> None:
    metrics = {"label": "test set", "pixel_best_f1": 0.5, "image_average_precision": 0.25, "image_fpr": 0.0625}
    changed = dataclasses.replace(bundle.manifest, metrics={**metrics, "images": 7, "defective": 3})
    console = Console(file=io.StringIO(), width=160)
    console.print(bundle_view(dataclasses.replace(bundle, manifest=changed)))
    assert isinstance(console.file, io.StringIO)
    lines = [line.replace("\u2502", "|") for line in console.file.getvalue().splitlines()]
    rows = {cells[1].strip(): cells[2].strip() for line in lines if len(cells := line.split("|")) == 4}
    expected = {"pixel best F1": "50.00 %", "image AP": "25.00 %", "image FPR at T": "6.25 %", "test images": "7"}
    assert expected.items() <= rows.items()
    assert not set(metrics) & set(rows)
    assert set(bundle.manifest.metrics) - {"label", "images", "defective", "self_test"} <= set(METRIC_NAMES)


def test_a_verification_that_compared_nothing_is_no_success(bundle: Bundle, data: Path) -> None:
    alone = bundle.artefacts(kind="onnx", precision="fp32")
    drop = tuple({item.file for item in bundle.manifest.artefacts} - {alone[0].file})
    update_bundle(bundle, dataclasses.replace(bundle.manifest, artefacts=alone), {}, drop)
    with pytest.raises(ConfigError, match="Nothing was compared") as caught:
        verify(bundle.path, data=data, backend="onnxruntime:cpu")
    assert "--checkpoint" in caught.value.cure


def test_names_as_long_as_a_system_takes_fit_beside_what_is_added(tmp_path: Path) -> None:
    name = f"{'long' * 62}.png"  # 252 of 255 letters
    frame, empty = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32)
    write_reference(tmp_path, [ReferenceFrame(name, frame, empty, 0.0)] * 2, "me")
    entries = json.loads((tmp_path / "reference" / "reference.json").read_text())["frames"]
    assert [entry["name"] for entry in entries] == [name, name]
    assert len({entry["frame"] for entry in entries}) == 2
    shown = Example(name, np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.float32), 1.0, 0.0, label="good")
    assert [(tmp_path / "h" / file).is_file() for file in write_heatmaps(tmp_path / "h", [shown])] == [True]


def test_images_below_a_folder_named_ground_truth_count(tmp_path: Path) -> None:
    folder = tmp_path / "ground_truth" / "good"
    (folder / "ground_truth").mkdir(parents=True)
    for place in (folder / "a.png", folder / "ground_truth" / "b.png"):
        place.write_bytes(b"")
    assert verify_module._images(folder, 8) == [folder / "a.png"]


def test_timing_leaves_nothing_beside_the_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator compiles is kept beside a bundle; this one is on its way and goes elsewhere."""
    real, asked = backends.open_backend, []

    def record(*arguments: object, **options: object) -> object:
        asked.append(options["cache"])
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(backends, "open_backend", record)
    assert list(measure(bundle, [np.zeros((96, 80, 3), np.uint8)], runs=1, seconds=0.0))
    assert asked
    assert set(asked) == {False}
