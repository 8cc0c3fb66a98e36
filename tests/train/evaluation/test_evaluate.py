"""evaluate() on a small category on disk, with a scorer whose answers are known."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from tiny_sets import write_square_set

from saae_runtime.errors import DataError
from saae_runtime.images import read_image, read_mask
from saae_runtime.result import Scored
from saae_train.data.category import Category, find_category, from_folders
from saae_train.evaluation import metrics
from saae_train.evaluation.bootstrap import score_intervals
from saae_train.evaluation.evaluate import evaluate
from saae_train.evaluation.examples import representatives, sheet_columns

SIZES = [(20, 24), (24, 20), (31, 17), (20, 20)]


def draw(path: Path, index: int, defect: int, seed: int = 0) -> np.ndarray:
    """Gray noise with, for defect > 0, a square of that many gray levels more; returns the square's mask."""
    height, width = SIZES[index % len(SIZES)]
    rng = np.random.default_rng((seed, index, defect))
    picture = rng.integers(90, 110, (height, width, 3))
    mask = np.zeros((height, width), bool)
    if defect:
        mask[4 : 9 + index % 3, 5:10] = True
        picture[mask] += defect
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.astype(np.uint8)).save(path)
    return mask


def make_category(root: Path, masks: bool = True, bad: bool = True, good: bool = True) -> Category:
    base = root / "part"
    for i in range(5):
        draw(base / "train" / f"{i}.png", i, 0, seed=1)
    for i in range(6 if good else 0):
        draw(base / "good" / f"{i}.png", i, 0)
    if bad:
        for label, contrast in (("dent", 12), ("stain", 60)):
            for i in range(4):
                mask = draw(base / "bad" / label / f"{i}.png", i, contrast)
                if masks:
                    target = base / "masks" / label / f"{i}_mask.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(target)
    return from_folders(
        base / "train",
        abnormal=base / "bad" if bad else None,
        masks=base / "masks" if masks and bad else None,
        normal_test=base / "good" if good else None,
        name="part",
    )


def brightness(frame: np.ndarray) -> Scored:
    anomaly_map = frame.astype(np.float32).mean(axis=2) - 100.0
    return Scored(float(anomaly_map.max()), anomaly_map)


@pytest.fixture
def category(tmp_path: Path) -> Category:
    return make_category(tmp_path)


def test_overall_and_by_type_equal_the_metrics_of_the_listed_maps(category: Category) -> None:
    found = evaluate(brightness, category)
    assert [s.label for s in found.by_type] == ["dent", "stain"]
    for subset in (found.overall, *found.by_type):
        rows = [s for s in category.test if subset.label in ("overall", s.label) or not s.is_anomalous]
        frames = [read_image(s.path) for s in rows]
        maps = [brightness(f).anomaly_map for f in frames]
        masks = [None if s.mask is None else read_mask(s.mask) for s in rows]
        for name, metric in metrics.pixel_metrics(maps, masks, intervals=True).items():
            same = subset.metrics[name]
            assert same.value == metric.value
            # The histograms behind intervals have the whole pool's bins.
            assert (same.low, same.high) == pytest.approx((metric.low, metric.high), abs=1e-3)
        scores, labels = [m.max() for m in maps], [s.is_anomalous for s in rows]
        area, interval = metrics.roc_auc(scores, labels), score_intervals(scores, labels)
        assert (interval is None) == (area.value == 1.0)
        assert subset.metrics["image_roc_auc"] == (area.with_interval(*interval) if interval else area)
        assert (subset.images, subset.defective) == (len(rows), sum(labels))
        assert "pixel_fpr" not in subset.metrics  # no T was given
    assert len({s.mask for s in category.test}) == 9  # masks really were there
    dent, stain = found.by_type
    assert float(dent.metrics["pixel_roc_auc"]) < float(stain.metrics["pixel_roc_auc"])
    assert found.exact
    assert found.notes == ()
    best = found.best_f1_threshold
    assert best is not None
    assert 0 < best < 60


def test_rates_at_the_thresholds_given(category: Category) -> None:
    found = evaluate(brightness, category, threshold=15.0, image_threshold=20.0, intervals=False)
    assert (found.threshold, found.image_threshold) == (15.0, 20.0)
    stain = found.by_type[1].metrics
    assert float(stain["image_fpr"]) == 0.0  # noise stays below 10
    assert float(stain["image_tpr"]) == 1.0
    assert float(stain["pixel_fpr"]) == 0.0
    assert float(stain["pixel_tpr"]) == 1.0
    assert evaluate(brightness, category, threshold=-100.0).metric("pixel_fpr").value == 1.0


def test_image_rates_have_intervals_that_few_images_allow(category: Category) -> None:
    """Six good images without a false alarm do not show that there will be none."""
    for image_threshold, alarms, hits in ((20.0, 0, 4), (0.0, 6, 8), (90.0, 0, 0)):
        overall = evaluate(brightness, category, threshold=15.0, image_threshold=image_threshold).overall.metrics
        for key, found, count in (("image_fpr", alarms, 6), ("image_tpr", hits, 8)):
            metric = overall[key]
            expected = stats.binomtest(found, count).proportion_ci(0.95, method="wilson")
            assert metric.value == found / count
            assert (metric.low, metric.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
        pixels = overall["pixel_fpr_good"]
        assert (pixels.value, pixels.low, pixels.high) == (0.0, None, None)


def test_a_coarse_map_is_brought_to_the_image_size(category: Category) -> None:
    def coarse(frame: np.ndarray) -> Scored:
        found = brightness(frame)
        anomaly_map = found.anomaly_map
        h, w = anomaly_map.shape[0] // 2 * 2, anomaly_map.shape[1] // 2 * 2
        return Scored(found.score, anomaly_map[:h, :w].reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3)))

    assert float(evaluate(coarse, category).metric("pixel_roc_auc")) > 0.9


def test_json_holds_everything_and_no_nan(category: Category) -> None:
    found = evaluate(brightness, category, threshold=15.0, image_threshold=20.0)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["category"] == "part"
    assert data["overall"]["metrics"]["pro_auc"]["value"] == found.metric("pro_auc").value
    assert len(data["overall"]["metrics"]["pro_auc"]["interval"]) == 2
    assert len(data["images"]) == len(category.test) == 14
    assert {c["title"] for c in data["curves"]} >= {"pixel ROC", "per-region overlap", "image ROC"}


def test_table_names_types_and_reasons(tmp_path: Path) -> None:
    def corner(frame: np.ndarray) -> Scored:
        anomaly_map = brightness(frame).anomaly_map
        return Scored(float(anomaly_map[0, 0]), anomaly_map)

    found = evaluate(corner, make_category(tmp_path, masks=False))
    out = StringIO()
    Console(file=out, width=160).print(found.table())
    text = out.getvalue()
    for word in ("dent", "stain", "overall", "image ROC-AUC", "no ground-truth masks"):
        assert word in text
    assert "nan" not in text.lower()
    assert "[" not in text
    Console(file=out, width=160).print(found.table(intervals=True))
    assert str(found.metric("image_roc_auc")) in out.getvalue()
    assert "[" in str(found.metric("image_roc_auc"))


# ---- what cannot be measured says why --------------------------------------------------------------


def test_without_masks_only_the_image_metrics_remain(tmp_path: Path) -> None:
    found = evaluate(brightness, make_category(tmp_path, masks=False), threshold=5.0)
    for name in ("pixel_roc_auc", "pro_auc", "pixel_average_precision", "pixel_tpr"):
        assert found.metric(name).reason == "the defective images have no ground-truth masks"
    assert float(found.metric("image_roc_auc")) > 0.9
    assert found.metric("pixel_fpr").value is not None
    assert "8 defective images have no mask" in found.notes[0]


def test_one_mask_missing_leaves_that_image_out(tmp_path: Path) -> None:
    category = make_category(tmp_path)
    rows = [s for s in category.test if s.mask is not None]
    Path(str(rows[0].mask)).unlink()
    again = from_folders(
        tmp_path / "part/train",
        abnormal=tmp_path / "part/bad",
        masks=tmp_path / "part/masks",
        normal_test=tmp_path / "part/good",
        name="part",
    )
    found = evaluate(brightness, again)
    assert found.metric("pixel_roc_auc").value is not None
    assert "1 defective images" in found.notes[0]


def test_all_normal_test_set(tmp_path: Path) -> None:
    found = evaluate(brightness, make_category(tmp_path, bad=False), threshold=5.0)
    assert found.by_type == ()
    assert found.metric("pro_auc").reason == "no defective pixel in the test set"
    assert found.metric("image_roc_auc").reason == "no defective image in the test set"
    assert found.metric("pixel_fpr").value is not None
    assert found.curves == ()


def test_no_good_test_image(tmp_path: Path) -> None:
    found = evaluate(brightness, make_category(tmp_path, good=False))
    assert found.metric("image_roc_auc").reason == "no defect-free image in the test set"
    assert found.metric("pixel_roc_auc").value is not None


def test_a_mask_without_a_defect_pixel_is_told(category: Category) -> None:
    mask = next(s.mask for s in category.test if s.mask is not None)
    Image.fromarray(np.zeros_like(read_mask(mask), dtype=np.uint8)).save(mask)
    assert "1 masks of defective images mark no pixel" in evaluate(brightness, category).notes[0]


def test_binned_evaluation_says_so(category: Category) -> None:
    exact = evaluate(brightness, category)
    found = evaluate(brightness, category, exact_pixels=2000)
    assert not found.exact
    assert "binned" in found.notes[-1]
    metric = found.metric("pixel_roc_auc")
    assert abs(float(metric) - float(exact.metric("pixel_roc_auc"))) <= metric.error


# ---- bad input --------------------------------------------------------------------------------------


def test_bad_scorers_and_data_are_named(category: Category, tmp_path: Path) -> None:
    def nan_map(frame: np.ndarray) -> Scored:
        found = brightness(frame)
        found.anomaly_map[0, 0] = np.nan
        return found

    with pytest.raises(DataError, match=r"\.png: 1 of \d+ values are NaN"):
        evaluate(nan_map, category)
    with pytest.raises(DataError, match=r"\.png: the score is nan"):
        evaluate(lambda f: Scored(float("nan"), brightness(f).anomaly_map), category)
    with pytest.raises(DataError, match="no test image"):
        evaluate(brightness, make_category(tmp_path / "other", bad=False, good=False))
    mask = next(s.mask for s in category.test if s.mask is not None)
    Image.fromarray(np.full((5, 5), 255, np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"its mask \(5, 5\)"):
        evaluate(brightness, category)


def test_representatives_are_the_middle_of_each_type(category: Category) -> None:
    found = evaluate(brightness, category)
    chosen = representatives(found)
    assert [c.label for c in chosen] == ["good", "dent", "stain"]
    scores = sorted(i.score for i in found.images if i.label == "good")
    assert chosen[0].score in scores[2:4]
    columns = sheet_columns(brightness, category, chosen)
    assert columns[0].truth is not None
    assert not columns[0].truth.any()
    assert columns[1].truth is not None
    assert columns[1].truth.any()
    assert all(c.anomaly_map.shape == c.frame.shape[:2] for c in columns)


def test_the_rate_on_good_images_stands_beside_that_around_defects(tmp_path: Path) -> None:
    write_square_set(tmp_path, "fabric_interior_part")
    category = find_category(tmp_path, "fabric_interior_part")

    def score(frame: np.ndarray) -> Scored:
        wide = np.zeros(frame.shape[:2], np.float32)
        if frame.max() > 200:
            wide[10:60, 10:54] = 1.0  # the square and a halo around it
        else:
            wide[0, :7] = 1.0
        return Scored(float(wide.max()), wide)

    found = evaluate(score, category, threshold=0.5, image_threshold=0.5, intervals=False)
    pixels, square = 70 * 64, 30 * 32
    assert found.metric("pixel_fpr_good").value == pytest.approx(7 / pixels)
    assert found.metric("pixel_fpr_halo").value == pytest.approx((50 * 44 - square) / (pixels - square))
    console = Console(width=80, file=StringIO())
    console.print(found.table())
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "spot" in text
    assert "of good images (what T is set for)" in " ".join(text.split())


def test_eighty_columns_show_every_defect_type_whole(tmp_path: Path) -> None:
    write_square_set(tmp_path)
    bad = tmp_path / "part/test"
    for name in ("fabric_border", "fabric_interior"):
        shutil.copytree(bad / "spot", bad / name)
        shutil.copytree(tmp_path / "part/ground_truth/spot", tmp_path / "part/ground_truth" / name)
    category = find_category(tmp_path, "part")
    found = evaluate(
        lambda frame: Scored(float(frame.max()), frame.max(axis=2).astype(np.float32)),
        category,
        threshold=200.0,
        image_threshold=200.0,
    )
    console = Console(width=80, file=StringIO())
    console.print(found.table())
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    for name in ("fabric_border", "fabric_interior"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert "…" not in console.file.getvalue()
