"""Recipes and masks: map, score, mask and record agree; engines are shared; a change replaces the whole or nothing."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_parts import bad, good, wait_until
from tiny_bundle import expected_map, gray_frame, make_tiny_bundle

from saae_runtime.errors import BundleError, ConfigError, FrameError, ImageError
from saae_runtime.line.config import RecipeConfig
from saae_runtime.line.engines import Engines, Way
from saae_runtime.line.masks import Masks, draw, within
from saae_runtime.line.recipes import RecipeBook
from saae_runtime.regions import defect_mask
from saae_runtime.render import save_png
from saae_runtime.result import Result

SIZE = (64, 96)


def recipe(tiny: Path, **options: object) -> RecipeConfig:
    return RecipeConfig(**{"name": "r", "bundle": str(tiny), "threads": 1, **options})  # type: ignore[arg-type]


def box(left: float, top: float, right: float, bottom: float) -> tuple[tuple[float, float], ...]:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


# --- masks ---


def test_a_polygon_covers_its_corners() -> None:
    allowed = draw((box(20, 10, 29, 19),), SIZE)
    assert allowed.sum() == 100
    assert allowed[10:20, 20:30].all()
    assert not draw((box(200, 100, 300, 200),), SIZE).any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.floats(0.1, 0.9), pixel=st.floats(0.1, 0.9))
def test_masked_results_follow_the_rule_of_whole_frames(seed: int, limit: float, pixel: float) -> None:
    random = np.random.default_rng(seed)
    anomaly_map = random.random((12, 15), np.float32)
    allowed = random.random((12, 15)) < 0.5
    allowed[random.integers(12), random.integers(15)] = True
    score = float(anomaly_map.max())
    whole = Result(score, anomaly_map, defect_mask(anomaly_map, pixel, limit, score), pixel, limit, 0.5)
    found = within(whole, allowed, None)
    outside_is_good = np.where(allowed, anomaly_map, np.float32(0))
    assert found.score == float(anomaly_map[allowed].max())
    np.testing.assert_array_equal(found.anomaly_map, outside_is_good)
    np.testing.assert_array_equal(found.mask, defect_mask(outside_is_good, pixel, limit, found.score))
    assert not found.mask[~allowed].any()
    assert found.is_anomalous == bool(found.mask.any())


def test_a_mask_that_holds_the_highest_place_changes_no_bit(tiny: Path, engines: Engines) -> None:
    book = RecipeBook([recipe(tiny, roi=(box(0, 0, 60, 60),)), recipe(tiny, name="whole")], Path(), engines)
    frame = gray_frame((100, 150), spot=(20, 30, 9, 14))  # resized: the map's peak lies a hair below the score
    one, whole = book.get("whole").judge(frame), book.get("r").judge(frame)
    assert one.score == whole.score
    np.testing.assert_array_equal(one.mask, whole.mask)


@pytest.mark.parametrize(
    ("areas", "is_bad"),
    [
        ({}, True),
        ({"roi": (box(15, 5, 40, 25),)}, True),
        ({"roi": (box(50, 30, 90, 60),)}, False),
        ({"ignore": (box(15, 5, 40, 25),)}, False),
        ({"ignore": (box(50, 30, 90, 60),)}, True),
        ({"roi": (box(15, 5, 40, 25),), "ignore": (box(18, 8, 36, 22),)}, False),
        ({"roi": "roi.png"}, False),
        ({"ignore": "roi.png"}, True),
    ],
)
def test_a_defect_counts_where_it_is_judged(
    tiny: Path, engines: Engines, tmp_path: Path, areas: dict[str, object], is_bad: bool
) -> None:
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[40:60, 50:90] = 255
    save_png(tmp_path / "roi.png", picture)
    found = RecipeBook([recipe(tiny, **areas)], tmp_path, engines).get("r")
    result = found.judge(bad())
    assert result.is_anomalous == is_bad
    assert bool(result.regions()) == is_bad
    assert result.mask.any() == is_bad
    assert result.anomaly_map.max() == result.score
    described = found.described_masks(SIZE)
    if not areas:
        assert described is None
    else:
        allowed = found.masks.allowed(SIZE)
        assert allowed is not None
        assert described is not None
        assert described["judged"] == pytest.approx(allowed.mean())
        np.testing.assert_array_equal(result.anomaly_map[allowed], found.shared.engine(bad()).anomaly_map[allowed])


def test_masks_that_cannot_be(tiny: Path, engines: Engines, tmp_path: Path) -> None:
    save_png(tmp_path / "m.png", np.full((30, 40, 3), 255, np.uint8))
    with pytest.raises(ImageError):
        Masks(recipe(tiny, roi="gone.png"), tmp_path)
    with pytest.raises(FrameError, match="exclude the whole frame"):
        Masks(recipe(tiny, ignore="m.png"), tmp_path)
    other = RecipeBook([recipe(tiny, roi="m.png")], tmp_path, engines).get("r")
    with pytest.raises(FrameError, match="40 x 30"):
        other.judge(good())
    assert other.judge(gray_frame((30, 40))).score == 0
    nothing = RecipeBook([recipe(tiny, roi=(box(500, 500, 600, 600),))], tmp_path, engines).get("r")
    with pytest.raises(FrameError, match="exclude the whole frame"):
        nothing.judge(good())


# --- recipes ---


def test_thresholds_of_recipes_share_one_engine(tiny: Path, engines: Engines) -> None:
    configs = [
        recipe(tiny, name="default"),
        recipe(tiny, name="rate", false_alarms=0.01),
        recipe(tiny, name="value", threshold=130.0, pixel_threshold=7.0),
    ]
    book = RecipeBook(configs, Path(), engines)
    assert [book.get(name).threshold for name in book.names] == [40.0, 20.0, 130.0]
    assert len({id(book.get(name).shared) for name in book.names}) == 1
    assert [book.get(name).judge(bad()).is_anomalous for name in book.names] == [True, True, False]
    assert book.get("value").judge(bad()).threshold == 7.0
    np.testing.assert_allclose(book.get("default").judge(bad()).anomaly_map, expected_map(bad()), atol=1e-3)


def test_a_change_takes_the_place_of_the_whole_recipe(tiny: Path, strict: Path, engines: Engines) -> None:
    book = RecipeBook([recipe(tiny, false_alarms=0.01)], Path(), engines)
    before, after = book.change("r", threshold=30.0)
    assert (before.threshold, after.threshold, book.get("r").threshold) == (20.0, 30.0, 30.0)
    assert (before.version, after.version) == (1, 2)
    assert after.config.false_alarms is None
    _, other = book.change("r", bundle=str(strict), false_alarms=0.001)
    assert other.threshold == 200.0
    assert other.bundle != before.bundle
    assert before.judge(bad()).is_anomalous  # whoever began with it goes on with it
    assert not other.judge(bad()).is_anomalous


def test_a_prepared_change_counts_when_it_is_activated(tiny: Path, engines: Engines) -> None:
    book = RecipeBook([recipe(tiny)], Path(), engines)
    before, after = book.prepare("r", threshold=30.0)
    assert book.get("r") is before
    book.change("r", threshold=35.0)
    with pytest.raises(ConfigError, match="another user"):
        book.activate(before, after)
    assert book.get("r").threshold == 35.0


def test_a_change_that_cannot_be_changes_nothing(tiny: Path, engines: Engines, tmp_path: Path) -> None:
    book = RecipeBook([recipe(tiny)], tmp_path, engines)
    for changes, kind in (
        ({"bundle": str(tmp_path / "gone")}, BundleError),
        ({"false_alarms": 7.0}, ConfigError),
        ({"colour": 1}, ConfigError),
        ({"name": "other"}, ConfigError),
        ({"roi": "gone.png"}, ImageError),
    ):
        with pytest.raises(kind):
            book.change("r", **changes)
    assert book.get("r").version == 1
    with pytest.raises(ConfigError, match="did you mean r"):
        book.get("rr")


def test_part_ids_name_recipes_among_those_of_the_station(tiny: Path, engines: Engines) -> None:
    configs = [recipe(tiny, name="a", part_ids=("A-*",)), recipe(tiny, name="b", part_ids=("*-7", "B?"))]
    book = RecipeBook(configs, Path(), engines)
    assert [book.named_by(part, ["a", "b"]) for part in ("A-1", "A-7", "C-7", "B1", "x")] == ["a", "a", "b", "b", None]
    assert book.named_by("A-7", ["b"]) == "b"


# --- engines ---


def test_an_engine_closes_when_nobody_holds_it(tiny: Path, strict: Path, engines: Engines) -> None:
    first = engines.take(tiny, Way(threads=1))
    assert engines.take(tiny, Way(threads=1)) is first
    assert engines.take(strict, Way(threads=1)) is not first
    engine = first.engine
    del first
    gc.collect()
    assert wait_until(lambda: "closed" in repr(engine))
    assert engines.take(tiny, Way(threads=1)).engine is not engine


def test_a_bundle_that_was_replaced_is_another_engine(engines: Engines, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "b")
    first = engines.take(folder, Way(threads=1))
    shutil.rmtree(folder)
    make_tiny_bundle(folder, threshold=50.0)
    second = engines.take(folder, Way(threads=1))
    assert second.digest != first.digest
    assert second.engine.image_threshold == 50.0
    assert first.engine.image_threshold == 40.0
    assert dataclasses.is_dataclass(second)
