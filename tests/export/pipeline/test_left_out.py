"""Thresholds from left-out scores: the images that are named, and the scale of a precision."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_builds import CONFIG
from tiny_models import noise_frames, tiny_detector
from twelve_bits import WHITE, write_twice

from saae_export.parity.pytorch import TorchReference
from saae_export.pipeline import report as pipeline_report
from saae_export.pipeline.left_out import LeftOutCalibrator
from saae_export.pipeline.report import add_left_out
from saae_export.report.data import Report
from saae_runtime.errors import CalibrationError
from saae_train.config import FitConfig
from saae_train.data.category import Sample
from saae_train.data.split import content_digest, content_hashes
from saae_train.fitting.backbone import backbone_for
from saae_train.fitting.fit import fit
from saae_train.model.checkpoint import Checkpoint
from saae_train.model.left_out import LeftOut
from saae_train.record import FitRecord

COUNT = 30


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[Checkpoint, list[Sample]]:
    """A model whose eighth image is unlike the others, and its images."""
    detector = tiny_detector(components=48, score="memory", memory=40)
    scores = torch.from_numpy(np.random.default_rng(0).normal(1.0, 0.03, (COUNT, *detector.backbone.grid))).float()
    scores[7] *= 2.0  # a scratch that nobody saw
    names = tuple(f"{number:02}.png" for number in range(COUNT))
    samples = []
    for name, frame in zip(names, noise_frames(COUNT, (64, 64)), strict=True):
        Image.fromarray(frame).save(tmp_path / name)
        samples.append(Sample(tmp_path / name, "good", None, False))
    left_out = LeftOut(scores, names, hashes=content_hashes(samples))
    return Checkpoint(detector, FitConfig(), "part", left_out=left_out), samples


def calibrated(checkpoint: Checkpoint, samples: list[Sample]) -> LeftOutCalibrator:
    return LeftOutCalibrator(checkpoint, samples, TorchReference(checkpoint.detector, (64, 64)), 0.001, 0.05)


@pytest.fixture
def calibrator(fitted: tuple[Checkpoint, list[Sample]]) -> LeftOutCalibrator:
    return calibrated(*fitted)


def test_an_image_unlike_the_others_is_named_and_decides_nothing(calibrator: LeftOutCalibrator) -> None:
    (found,) = calibrator.outliers()
    assert (found.index, found.name) == (7, "07.png")
    assert found.score > 1.5
    assert found.leverage < 0.02


def test_the_tables_follow_the_scale_of_the_deployed_graph(calibrator: LeftOutCalibrator) -> None:
    expected = iter(2 * [1.1 * score for score in calibrator._expected])
    engine = lambda frame: SimpleNamespace(score=next(expected))  # noqa: E731 - all that is asked of an engine
    moved = calibrator(engine)  # type: ignore[arg-type]
    same = calibrator(lambda frame, scores=iter(calibrator._expected): SimpleNamespace(score=next(scores)))  # type: ignore[arg-type,misc]
    assert moved.image.at() == pytest.approx(1.1 * same.image.at(), rel=1e-6)
    assert moved.pixel.at() == pytest.approx(1.1 * same.pixel.at(), rel=1e-6)
    assert moved.scores[7] == pytest.approx(1.1 * same.scores[7], rel=1e-6)


def test_the_scale_is_measured_on_frames_that_the_memory_does_not_hold(
    calibrator: LeftOutCalibrator, tmp_path: Path
) -> None:
    fitted = {np.asarray(Image.open(path)).tobytes() for path in tmp_path.glob("*.png")}
    seen: list[np.ndarray] = []
    calibrator(lambda frame: (seen.append(frame), SimpleNamespace(score=1.0))[1])  # type: ignore[arg-type]
    assert len(seen) == 16
    assert not fitted & {frame.tobytes() for frame in seen}
    assert fitted >= {frame[:, ::-1].tobytes() for frame in seen}


def reported(calibrator: LeftOutCalibrator, seen: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report from an engine that notes what it scores."""
    limits = {"threshold": 1.0, "image_threshold": 1.0}

    def engine(frame: np.ndarray) -> SimpleNamespace:
        seen.append(frame)
        return SimpleNamespace(score=1.0, anomaly_map=np.zeros(frame.shape[:2], np.float32), **limits)

    engine.threshold, engine.image_threshold = 1.0, 1.0  # type: ignore[attr-defined]
    engine.backend = SimpleNamespace(name="x", description="y")  # type: ignore[attr-defined]
    monkeypatch.setattr(pipeline_report, "deployed", lambda bundle: nullcontext(engine))
    empty = Report(SimpleNamespace())  # type: ignore[arg-type]
    return add_left_out(empty, calibrator, None, None, calibrator.outliers())  # type: ignore[arg-type]


def test_the_report_shows_left_out_scores_and_scores_no_fitted_image_for_them(
    calibrator: LeftOutCalibrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    found = reported(calibrator, seen, monkeypatch)
    assert len(seen) == 16 + 4, "the scale, and four examples"
    left_out = calibrator._reference.scores
    assert found.held_out_scores == pytest.approx([score * calibrator.factor for score in left_out])
    largest = [f"{index:02}.png" for index in np.argsort(left_out)[::-1][:4]]
    assert [item.name for item in found.examples] == ["07.png", *largest]


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "none", "without the outlier", "no hashes"])
def test_other_images_are_shown_with_their_own_scores(
    fitted: tuple[Checkpoint, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    checkpoint, samples = fitted
    assert checkpoint.left_out is not None
    known = calibrated(checkpoint, samples)
    if change == "no hashes":  # as earlier versions wrote it, without the digest of these images
        checkpoint = replace(checkpoint, left_out=LeftOut(checkpoint.left_out.scores, checkpoint.left_out.names))
    if change in ("more", "none"):
        path = tmp_path / "-new.png"
        Image.fromarray(noise_frames(1, (64, 64), 99)[0]).save(path)
        new = [Sample(path, "good", None, False)]
        samples = new + samples if change == "more" else new
    if change == "fewer":
        samples = samples[:3] + samples[5:9]
    if change == "without the outlier":
        samples = samples[:7] + samples[8:]
    if change == "renamed":
        samples[7].path.rename(tmp_path / "-odd.png")
        samples = [replace(samples[7], path=tmp_path / "-odd.png"), *samples[:7], *samples[8:]]
    found = calibrated(checkpoint, samples)
    assert (found._reference.image, found._reference.pixel) == (known._reference.image, known._reference.pixel)
    shown = {"more": ["07.png"], "fewer": ["07.png"], "renamed": ["-odd.png"]}.get(change, [])
    assert [item.name for item in found.outliers()] == shown
    examples = reported(found, [], monkeypatch).examples
    assert [item.name for item in examples[: len(shown)]] == shown
    for item in examples:
        sample = next(sample for sample in samples if sample.path.name == item.name)
        assert np.array_equal(item.frame, sample.read())
    for item in examples[: len(shown)]:
        assert item.score == pytest.approx(known._reference.scores[7] * found.factor)
    assert len(examples) == (0 if change in ("none", "no hashes") else len(shown) + 4)


def test_a_model_of_an_earlier_version_knows_its_images_by_their_digest(
    fitted: tuple[Checkpoint, list[Sample]],
) -> None:
    checkpoint, samples = fitted
    assert checkpoint.left_out is not None
    left_out = LeftOut(checkpoint.left_out.scores, checkpoint.left_out.names)
    old = replace(checkpoint, left_out=left_out, record=FitRecord(digest=content_digest(samples)))
    assert [item.name for item in calibrated(old, samples).outliers()] == ["07.png"]


def test_images_of_a_twelve_bit_camera_give_the_memory_and_thresholds_of_their_levels(tmp_path: Path) -> None:
    config = CONFIG.replace(input_size=(48, 48), layers=(1,), components=16, latent=6, steps=2)
    assert config.score == "memory"
    folders = write_twice([frame[:, :, 0] for frame in noise_frames(8, (48, 48))], tmp_path)
    found = []
    for folder, white_level in zip(folders, (None, WHITE), strict=True):
        samples = [Sample(path, "good", None, False, (), white_level) for path in sorted(folder.iterdir())]
        backbone = backbone_for(config, samples, "random")
        model = fit(backbone, samples, config.replace(white_level=white_level), "part", cache=tmp_path / "cache")
        calibrator = LeftOutCalibrator(model, samples, TorchReference(model.detector, (48, 48)), 0.001, 0.05)
        tables = calibrator(lambda frame, known=iter(calibrator._expected): SimpleNamespace(score=next(known)))  # type: ignore[arg-type,misc]
        found.append((tables.pixel, tables.image, tables.scores, calibrator._expected))
    assert found[0] == found[1]


def test_a_model_without_a_memory_has_no_such_scores() -> None:
    detector = tiny_detector()
    config = FitConfig(score="l2", memory=None, held_out=0.15)
    with pytest.raises(CalibrationError, match="no scores of its own images"):
        LeftOutCalibrator(Checkpoint(detector, config, "part"), (), TorchReference(detector, (64, 64)), 0.001, 0.05)


def test_images_of_one_distribution_are_named_seldom(fitted: tuple[Checkpoint, list[Sample]]) -> None:
    """Among thirty, each moves the threshold by some percent: that alone is no reason to look at one."""
    checkpoint, samples = fitted
    assert checkpoint.left_out is not None
    rng, named = np.random.default_rng(1), 0

    class Unasked:
        """Only the left-out scores count here."""

        frame_size = (64, 64)

        def __call__(self, frame: np.ndarray) -> SimpleNamespace:
            return SimpleNamespace(score=1.0)

    for _ in range(20):
        level = np.exp(rng.normal(0.0, 0.2, (COUNT, 1, 1)))
        scores = torch.from_numpy(np.broadcast_to(level, checkpoint.left_out.scores.shape).copy()).float()
        drawn = dataclasses.replace(checkpoint, left_out=dataclasses.replace(checkpoint.left_out, scores=scores))
        found = LeftOutCalibrator(drawn, samples, Unasked(), 0.001, 0.05).outliers()  # type: ignore[arg-type]
        named += sum(item.score <= 1.0 for item in found)
    assert named <= 4
