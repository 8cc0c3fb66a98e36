"""Thresholds from held-out normal images: the promised rates hold on the images that they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saae_runtime.errors import CalibrationError, ConfigError, ImageError
from saae_runtime.result import Scored
from saae_runtime.thresholds import MARGIN
from saae_train.calibrate import OBJECT_FPR, TEXTURE_FPR, calibrate, default_fpr
from saae_train.data.category import Sample
from saae_train.data.split import content_digest

pytestmark = pytest.mark.needs("torch")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for index in range(9):
        path = tmp_path / f"{index}.png"
        # Every image its own size.
        Image.fromarray(rng.integers(0, 256, (30 + index, 40, 3), np.uint8)).save(path)
        found.append(Sample(path, "good", None, False))
    return found


def score(frame: np.ndarray) -> Scored:
    """A map that depends on each pixel, and an image score that is not its maximum."""
    values = frame.astype(np.float32) @ np.array([1.0, 1 / 256, 1 / 65536], np.float32)
    return Scored(float(values.mean()), values)


def every_map(samples: list[Sample]) -> np.ndarray:
    return np.concatenate([score(np.asarray(Image.open(sample.path))).anomaly_map.ravel() for sample in samples])


@pytest.mark.parametrize("fpr", [0.0, 0.001, 0.05])
def test_the_rate_asked_for_holds_on_the_images(samples: list[Sample], fpr: float) -> None:
    found = calibrate(score, samples, pixel_fpr=fpr)
    values = every_map(samples)
    assert found.pixel.count == values.size
    assert found.pixel.default_fpr == fpr
    above = (values > found.pixel.at(None)).mean()
    assert above <= fpr
    assert above >= fpr - 3 / values.size  # and no higher than it has to be
    for other in (0.0, 0.01, 0.1, 0.5):  # chosen later, at run time
        # Between two levels of the table the safer threshold is taken: up to a quarter fewer.
        assert 0.79 * other - 0.002 <= (values > found.pixel.at(other)).mean() <= other


def test_zero_is_the_largest_value_seen(samples: list[Sample]) -> None:
    found = calibrate(score, samples, pixel_fpr=TEXTURE_FPR)
    assert found.pixel.at(None) == pytest.approx(every_map(samples).max() * (1 + MARGIN), rel=1e-9)
    assert found.image.at(None) == pytest.approx(max(found.scores) * (1 + MARGIN), rel=1e-9)


def test_images_have_their_own_threshold(samples: list[Sample]) -> None:
    found = calibrate(score, samples, image_fpr=0.25)
    expected = [score(np.asarray(Image.open(sample.path))).score for sample in samples]
    assert found.scores == pytest.approx(expected)
    assert found.image.count == 9
    assert sum(value > found.image.at(None) for value in expected) == 2  # a quarter of nine, rounded down


def test_defaults_are_the_papers(samples: list[Sample]) -> None:
    assert (TEXTURE_FPR, OBJECT_FPR) == (0.0, 0.001)  # section 4.1.2
    found = calibrate(score, samples)
    assert found.pixel.default_fpr == OBJECT_FPR
    assert found.image.default_fpr == 0.0


def test_digest_and_progress(samples: list[Sample]) -> None:
    calls: list[tuple[int, int]] = []
    found = calibrate(score, samples[:3], progress=lambda *call: calls.append(call))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert found.digest == content_digest(samples[:3])
    assert found.digest != calibrate(score, samples[:2]).digest


def test_no_images() -> None:
    with pytest.raises(CalibrationError, match="no normal images") as caught:
        calibrate(score, [])
    assert caught.value.cure


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["map", "score"])
def test_scores_that_are_not_finite(samples: list[Sample], bad: float, where: str) -> None:
    def broken(frame: np.ndarray) -> Scored:
        found = score(frame)
        if where == "map":
            found.anomaly_map[3, 4] = bad
            return found
        return Scored(bad, found.anomaly_map)

    with pytest.raises(CalibrationError, match="NaN or infinite"):
        calibrate(broken, samples)


@pytest.mark.parametrize("rates", [{"pixel_fpr": -0.1}, {"pixel_fpr": 1.5}, {"image_fpr": 2.0}])
def test_impossible_rates(samples: list[Sample], rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        calibrate(score, samples, **rates)


def test_an_unreadable_image_is_named(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"4\.png"):
        calibrate(score, samples)


def test_what_a_model_was_fitted_as_counts_before_its_name() -> None:
    assert default_fpr(True, "bottle") == TEXTURE_FPR
    assert default_fpr(False, "tile") == OBJECT_FPR
    assert default_fpr(None, "tile") == TEXTURE_FPR
    assert default_fpr(None, "bottle") == OBJECT_FPR
