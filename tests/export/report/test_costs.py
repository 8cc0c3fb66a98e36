"""What thresholds cost: counts against counting by hand, the curve, and the images that another rate would flip."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_bundle import tiny_manifest

from saae_export.report.costs import costs
from saae_export.report.data import Report
from saae_export.report.html import render_report
from saae_runtime.manifest import Thresholds
from saae_runtime.thresholds import ThresholdTable
from saae_train.evaluation.ranking import Metric
from saae_train.evaluation.result import Evaluation, ImageScore, Subset
from saae_train.evaluation.share import Share
from saae_train.selftest.result import Defect, SelfTest

GOOD = [0.30, 0.31, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37, 0.38, 0.6]
IMAGE = ThresholdTable.estimated(GOOD, 0.05)


def report_of(test: list[tuple[str, str, float]], drawn: tuple[Defect, ...] = ()) -> Report:
    """A report on GOOD, with test images (file, label, score) and simulated defects."""
    images = tuple(ImageScore(file, (4, 4), label, label != "good", score, score, 0.1) for file, label, score in test)
    evaluation = Evaluation(
        category="x",
        synthetic=False,
        overall=Subset("overall", len(images), 1, {}),
        by_type=(),
        images=images,
        curves=(),
        threshold=1.0,
        image_threshold=IMAGE.at(),
        best_f1_threshold=None,
        pro_limit=0.3,
        exact=True,
        notes=(),
    )
    found = SelfTest(drawn, Share(0, 0), 1.0, 1.0, Metric(0.9), Metric(0.9), {}, 1, 0) if drawn else None
    pixel = ThresholdTable.from_samples(np.linspace(0, 1, 1000), 0.001)
    manifest = dataclasses.replace(tiny_manifest(), thresholds={"fp32": Thresholds(pixel, IMAGE)})
    return Report(manifest, evaluation=evaluation, self_test=found, held_out_scores=GOOD, image_threshold=IMAGE.at())


def defect(kind: str, size: str, score: float) -> Defect:
    recipe = (0, 1, kind, size, "strong", 7)
    return Defect("a.png", kind, size, "strong", 9.0, 70, 80.0, score, score, score > 1, True, recipe)


def test_counts_at_every_rate_are_those_of_the_scores() -> None:
    test = [("g.png", "good", 0.3), *((f"d{n}.png", "scratch", 0.3 + 0.05 * n) for n in range(9))]
    found = costs(report_of(test))
    assert found is not None
    assert [row["default"] for row in found["rows"]].count(True) == 1
    for row in found["rows"]:
        rate, limit, above, _, real, easy, simulated = row["cells"]
        threshold = IMAGE.at(float(rate) / 1000)
        assert float(limit) == pytest.approx(threshold, rel=1e-3)
        assert above == f"{sum(score > threshold for score in GOOD)} of 10"
        assert real == f"{sum(score <= threshold for _, label, score in test if label != 'good')} of 9"
        assert easy == simulated == "-"


def test_simulated_misses_weight_every_kind_and_size_alike() -> None:
    # three of a kind are missed at any threshold, one of another is found: half, not three quarters
    drawn = (*(defect("spot", "small", 0.01) for _ in range(3)), defect("scratch", "large", 50.0))
    found = costs(report_of([("g.png", "good", 0.3)], drawn))
    assert found is not None
    assert {row["cells"][-1] for row in found["rows"]} == {"50 %"}
    assert {row["cells"][-2] for row in found["rows"]} == {"0 of 1"}


def test_images_that_flip_are_named_on_the_right_side() -> None:
    default, lower, higher = IMAGE.at(), IMAGE.at(0.1), IMAGE.at(0.02)
    assert lower < default < higher
    between_low, between_high = (lower + default) / 2, (default + higher) / 2
    test = [
        ("missed.png", "scratch", between_low),
        ("good.png", "good", between_low),
        ("found.png", "scratch", between_high),
        ("sure.png", "scratch", 100.0),
        ("clean.png", "good", 0.01),
    ]
    found = costs(report_of(test))
    assert found is not None
    flips = {(row["rate"], row["words"]): row["names"] for row in found["flips"]}
    assert flips == {
        ("20", "1 defective image more would be missed"): "found.png",
        ("10", "1 defective image more would be missed"): "found.png",
        ("100", "1 good image more would be called defective"): "good.png",
        ("100", "1 defective image more would be found"): "missed.png",
    }


def test_the_curve_has_a_line_for_each_kind_of_image_and_marks_the_default() -> None:
    drawn = (defect("spot", "small", 0.35), defect("spot", "large", 0.7))
    found = costs(report_of([("a.png", "scratch", 0.5), ("g.png", "good", 0.3)], drawn))
    assert found is not None
    svg = ElementTree.fromstring(found["chart"])
    words = [text.text for text in svg.iter("text")]
    assert {"good above T", "real missed", "simulated missed", "default 50 in 1000"} <= set(words)
    assert sum(line.get("class", "").startswith("line s") for line in svg.iter("polyline")) == 3


def test_the_page_shows_costs_only_where_they_were_estimated() -> None:
    report = report_of([("a.png", "scratch", 0.5), ("g.png", "good", 0.3)])
    page = render_report(report)
    part = page[page.index("What a threshold costs") : page.index("Threshold of pixels")]
    assert "1 of 10" in part
    assert "default 50 in 1000" in part
    quantile = ThresholdTable.from_samples(np.asarray(GOOD), 0.05)
    tables = {"fp32": Thresholds(report.manifest.thresholds["fp32"].pixel, quantile)}
    manifest = dataclasses.replace(report.manifest, thresholds=tables)
    assert "What a threshold costs" not in render_report(dataclasses.replace(report, manifest=manifest))
