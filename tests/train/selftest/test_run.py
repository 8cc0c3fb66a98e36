"""The self-test: what a seeing, a blind and an alarmed scorer get, what the result says, and the command."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy import ndimage, stats

from saae_runtime.errors import ConfigError, DataError, SelfTestError
from saae_runtime.result import Scored
from saae_train.data.category import GOOD, Sample
from saae_train.evaluation.ranking import Metric
from saae_train.evaluation.share import Share
from saae_train.selftest import run
from saae_train.selftest.chart import chart
from saae_train.selftest.result import Defect, SelfTest
from saae_train.selftest.run import draw_examples, require_detection
from saae_train.selftest.simulate import CONTRASTS, KINDS, SIZES

pytestmark = pytest.mark.needs("torch")

SIDE = 96


@dataclass
class Model:
    """A detector with its T, of pixels and of images."""

    compute: Callable[[np.ndarray], np.ndarray]
    limit: float = 1.0

    def __call__(self, frame: np.ndarray) -> Scored:
        found = self.compute(frame)
        return Scored(float(found.max()), found)


def selftest(model: Model, samples: list[Sample], **options: Any) -> SelfTest:
    return run.selftest(model, samples, **{"threshold": model.limit, "image_threshold": model.limit, **options})


def scene(seed: int) -> np.ndarray:
    """uint8 SIDE x SIDE x 3: always the same part, with this picture's own noise."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    part = 120 + 40 * np.sin(20 * x) * np.cos(13 * y) + 20 * np.sin(70 * x * y)
    noise = np.random.default_rng(seed).normal(0, 2, (SIDE, SIDE))
    return np.clip((part + noise)[:, :, None] * [1.0, 0.9, 0.7], 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("normal")
    for index in range(6):
        Image.fromarray(scene(index)).save(folder / f"{index}.png")
    return [Sample(path, GOOD, None, False) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def seeing(samples: list[Sample]) -> Model:
    """A detector that works: the smoothed distance from the mean normal picture, thresholds from other normal ones."""
    mean = np.mean([scene(seed) for seed in range(100, 130)], axis=0)

    def distance(frame: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(np.abs(frame - mean).mean(axis=2), 1.0).astype(np.float32)

    limit = 1.02 * max(float(distance(scene(seed)).max()) for seed in range(20))

    return Model(distance, limit)


def constant(value: float) -> Model:
    """A detector that says the same of everything; T is 1."""
    return Model(lambda frame: np.full(frame.shape[:2], value, np.float32))


def test_a_detector_that_works_passes(samples: list[Sample], seeing: Model) -> None:
    result = selftest(seeing, samples, frames=40)
    assert len(result.defects) + sum(result.not_drawn.values()) == 40
    assert result.easy.count >= 8
    assert result.easy.found == result.easy.count
    assert result.judged
    assert not result.misses_easy
    require_detection(result, "")
    assert result.false_alarms == Share(0, 6)
    assert result.share().value is not None
    assert result.share(contrast="strong").value >= result.share(contrast="faint").value  # type: ignore[operator]
    assert result.pixel_roc_auc.value is not None
    assert result.pixel_roc_auc.value > 0.9
    assert result.pro_auc.value is not None
    assert result.pro_auc.value > 0.8
    # With one T for pixels and images, and a score that is the map's maximum, what is marked is found.
    assert all(d.found for d in result.defects if d.marked)


def test_a_blind_detector_is_refused(samples: list[Sample]) -> None:
    result = selftest(constant(0.0), samples, frames=30)
    assert result.share().found == result.share(marked=True).found == 0
    assert result.easy.count >= 5
    assert result.misses_easy
    assert result.pixel_roc_auc.value == pytest.approx(0.5)
    with pytest.raises(SelfTestError, match="blind") as caught:
        require_detection(result, "try something")
    assert caught.value.exit_code == 3
    assert "simulated" in caught.value.what
    assert caught.value.cure == "try something"


def test_a_detector_that_always_cries_is_not_blind_but_seen_through(samples: list[Sample]) -> None:
    result = selftest(constant(2.0), samples, frames=20)
    assert result.share().found == result.share().count
    assert result.false_alarms == Share(6, 6)
    require_detection(result, "")
    assert result.pixel_roc_auc.value == pytest.approx(0.5)


def test_two_scorers_see_the_same_pictures(samples: list[Sample], seeing: Model) -> None:
    frames: dict[str, list[bytes]] = {"a": [], "b": []}

    def spy(name: str) -> Model:
        def compute(frame: np.ndarray) -> np.ndarray:
            frames[name].append(frame.tobytes())
            return seeing.compute(frame)

        return Model(compute, seeing.limit)

    first, again = selftest(spy("a"), samples, frames=12, seed=3), selftest(spy("b"), samples, frames=12, seed=3)
    assert frames["a"] == frames["b"]
    assert first == again
    other = selftest(seeing, samples, frames=12, seed=4)
    assert [d.recipe for d in other.defects] != [d.recipe for d in first.defects]


def test_every_kind_and_size_is_planned(samples: list[Sample]) -> None:
    result = selftest(constant(0.0), samples, frames=60)
    assert result.kinds == KINDS
    tried = {(d.recipe[2], d.recipe[3]) for d in result.defects}
    assert len(tried) == len(KINDS) * len(SIZES)
    assert {d.file for d in result.defects} == {str(sample.path) for sample in samples}
    total = sum(result.share(kind, size, contrast).count for kind in KINDS for size in SIZES for contrast in CONTRASTS)
    assert total == len(result.defects)


def test_only_the_kinds_that_were_asked_for(samples: list[Sample]) -> None:
    result = selftest(constant(0.0), samples, frames=9, kinds=("spot", "blur"))
    assert set(result.kinds) <= {"spot", "blur"}
    assert {d.kind for d in result.defects if d.easy} == {"spot"}


def test_a_blur_alone_cannot_convict(samples: list[Sample]) -> None:
    result = selftest(constant(0.0), samples, frames=12, kinds=("blur",))
    assert not result.judged
    assert not result.misses_easy
    require_detection(result, "")
    assert result.summary()["blind"] is None
    assert any("too few" in note for note in result.notes())


def test_everything_says_simulated(samples: list[Sample], seeing: Model) -> None:
    result = selftest(seeing, samples, frames=20)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["simulated"] is True
    assert record["synthetic"] is False
    assert sum(cell["count"] for cell in record["cells"]) == len(record["defects"]) == record["found"]["count"]
    assert "SIMULATED" in str(result.table().title)
    assert "simulated" in str(result.table().caption).lower()
    assert "synthetic" in str(dataclasses.replace(result, synthetic=True).table().title)
    assert any("Simulated" in note for note in result.notes())


def test_examples_are_the_same_pictures_again(samples: list[Sample], seeing: Model) -> None:
    result = selftest(seeing, samples, frames=40)
    shown = draw_examples(seeing, samples, result)
    assert {defect.kind for defect, _ in shown} == set(result.kinds)
    for defect, column in shown:
        assert column.truth is not None
        assert int(column.truth.sum()) == defect.area
        assert float(column.anomaly_map[column.truth].max()) == pytest.approx(defect.peak)
        assert ("MISSED" in column.title) != defect.found
    for kind in {defect.kind for defect in result.defects if not defect.found}:
        assert any(defect.kind == kind and not defect.found for defect, _ in shown), "a miss is not shown"


def test_the_chart_shows_what_was_found(samples: list[Sample], seeing: Model) -> None:
    good, bad = (selftest(scorer, samples, frames=30) for scorer in (seeing, constant(0.0)))
    pictures = [chart(good), chart(bad)]
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].dtype == np.uint8
    assert (pictures[0] != pictures[1]).any()
    few = chart(selftest(seeing, samples, frames=6, kinds=("spot",)))
    assert few.shape[0] < pictures[0].shape[0]


def test_no_images(seeing: Model) -> None:
    with pytest.raises(DataError, match="no image"):
        selftest(seeing, [])


def test_one_image_is_enough_to_draw_on(samples: list[Sample], seeing: Model) -> None:
    result = selftest(seeing, samples[:1], frames=10)
    assert result.images == 1
    assert result.false_alarms.count == 1


def test_images_smaller_than_a_defect(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="too small"):
        selftest(constant(0.0), [Sample(tmp_path / "a.png", GOOD, None, False)], frames=2)


def test_images_of_one_colour(tmp_path: Path) -> None:
    """Kinds that cannot show are counted apart; the others are judged."""
    for index in range(2):
        Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / f"{index}.png")
    plain = [Sample(path, GOOD, None, False) for path in sorted(tmp_path.iterdir())]
    result = selftest(constant(0.0), plain, frames=30)
    assert set(result.not_drawn) == {"cut-paste", "missing part", "blur"}
    assert set(result.kinds) == {"scratch", "texture", "spot"}
    assert any("Could not be made visible" in note for note in result.notes())
    with pytest.raises(DataError, match="could be made visible"):
        selftest(constant(0.0), plain, frames=4, kinds=("blur",))


def test_images_of_many_sizes(tmp_path: Path) -> None:
    for index, size in enumerate([(64, 200), (150, 70), (33, 33)]):
        Image.fromarray(scene(index)).resize(size).convert("L").save(tmp_path / f"{index}.png")
    mixed = [Sample(path, GOOD, None, False) for path in sorted(tmp_path.iterdir())]
    result = selftest(constant(0.0), mixed, frames=24)
    assert result.images == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"frames": 0}, "at least one frame"), ({"kinds": ("dent",)}, "dent"), ({"kinds": ()}, "No kind")],
)
def test_options_that_cannot_work(samples: list[Sample], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        selftest(constant(0.0), samples, **changes)  # type: ignore[arg-type]


def test_pixels_and_images_have_their_own_threshold(samples: list[Sample]) -> None:
    result = selftest(constant(0.5), samples, frames=6, threshold=0.1, image_threshold=0.9)
    assert result.share(marked=True).found == result.share().count
    assert result.share().found == 0


def test_a_score_that_is_not_finite(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="nan"):
        selftest(constant(float("nan")), samples, frames=2)


@given(found=st.integers(0, 60), more=st.integers(0, 60))
def test_wilson_intervals_are_scipys(found: int, more: int) -> None:
    share = Share(found, found + more)
    if not share.count:
        assert share.value is None
        assert share.interval is None
        return
    expected = stats.binomtest(found, share.count).proportion_ci(0.95, method="wilson")
    assert share.interval == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert share.interval[0] <= share.found / share.count <= share.interval[1]


def test_totals_weight_every_kind_size_and_contrast_alike() -> None:
    def defect(size: str, contrast: str, found: bool) -> Defect:
        return Defect("a.png", KINDS[0], size, contrast, 9.0, 9, 40.0, 1.0, 1.0, found, found, (0, 0, "", "", "", 0))

    easy = [defect("large", "strong", True)] * 8
    hard = [defect("small", "faint", False)] * 2
    nothing = Metric(None, "not measured")
    result = SelfTest((*easy, *hard), Share(0, 21), 0.5, 0.5, nothing, nothing, {}, 1, 0)
    assert result.share().value == 0.8
    assert result.balanced() == 0.5
    assert result.balanced_text() == "50 %"
    assert result.summary()["found_balanced"] == 0.5
    console = Console(width=120, file=io.StringIO())
    console.print(result.table())
    assert isinstance(console.file, io.StringIO)
    assert "false alarms" not in console.file.getvalue()
    assert "50 %" in console.file.getvalue()
