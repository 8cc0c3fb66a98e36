"""The build report: what it shows, what it says where something is missing, and that nothing in it is code."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_bundle import tiny_manifest

from saae_export.report import html as html_module
from saae_export.report.data import Example, LatencyRow, Report
from saae_export.report.html import render_report, write_report
from saae_runtime import files, render
from saae_runtime.errors import FrameError, StorageError
from saae_runtime.manifest import Artefact, Backbone, Calibration, Manifest, Parity, Thresholds
from saae_runtime.thresholds import ThresholdTable
from saae_train.evaluation.curves import Curve
from saae_train.evaluation.ranking import Metric
from saae_train.evaluation.result import Evaluation, ImageScore, Subset
from saae_train.evaluation.share import Share
from saae_train.record import FitRecord
from saae_train.selftest.result import Defect, SelfTest

TABLE = ThresholdTable((0.0, 0.001, 0.1, 1.0), (4.0, 3.25, 2.0, 0.5), 0.001, 100_000)
PASSED = Parity(12, 2.1e-6, 1.3e-6, 0, 1e-4, 1e-4, True, "good/004.jpg", "PyTorch fp32")
ENGINE = Artefact("x-sm89.engine", "engine", "fp16", library="tensorrt")


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.hidden = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.hidden += tag == "style"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def example(truth: bool = True, size: tuple[int, int] = (40, 60)) -> Example:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    heat = np.zeros(size, np.float32)
    heat[10:20, 20:40] = 3.0
    return Example(
        "scratch/007.png", frame, heat, 1.0, 3.0, 2.0, heat > 2 if truth else None, "scratch", "most certain defect"
    )


def manifest(**changes: object) -> Manifest:
    found = dataclasses.replace(
        tiny_manifest(precisions=("fp32", "fp16")),
        category="zipper",
        created="2025-05-06T12:00:00Z",
        backbone=Backbone("vit_small_patch14_dinov2", "packaged", "ab" * 32),
        thresholds={"fp32": Thresholds(TABLE, TABLE), "fp16": Thresholds(TABLE, TABLE)},
        artefacts=(Artefact("model.onnx", "onnx", "fp32", parity=PASSED), ENGINE),
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def evaluation(label: str = "scratch", text: str = "no masks") -> Evaluation:
    overall = {"pixel_roc_auc": Metric(0.98534), "pro_auc": Metric(None, text), "image_roc_auc": Metric(0.75)}
    scores = [("good", 0.3), ("good", 0.8), (label, 0.4), (label, 1.5), (label, 1.75)]
    return Evaluation(
        category="zipper",
        synthetic=True,
        overall=Subset("overall", 5, 3, overall),
        by_type=(Subset(label, 5, 3, overall | {"pixel_roc_auc": Metric(0.97)}),),
        images=tuple(ImageScore("x.png", (4, 4), kind, kind != "good", score, score, 0.1) for kind, score in scores),
        curves=(Curve("PRO", np.array([0, 0.5, 1]), np.array([0, 0.9, 1]), "FPR", "overlap", Metric(0.9561), 0.3),),
        threshold=0.7,
        image_threshold=0.7,
        best_f1_threshold=None,
        pro_limit=0.3,
        exact=True,
        notes=(f"Half of the images were darker than usual. {text}",),
    )


def self_test(text: str = "glare") -> SelfTest:
    recipe = (0, 1, "spot", "large", "strong", 7)
    drawn = [Defect("a.png", "spot", "large", "strong", 9.0, 70, 80.0, 2.0, 2.0, n > 0, True, recipe) for n in range(6)]
    return SelfTest(tuple(drawn), Share(1, 8), 1.0, 1.0, Metric(0.91), Metric(0.82), {text: 2}, 1, 0)


def full(**changes: object) -> Report:
    data = Report(
        manifest=manifest(),
        bundle="bundles/zipper",
        source="./data",
        record=FitRecord(
            seconds_fit=184.0, loss=tuple((step, float(loss)) for step, loss in enumerate(np.geomspace(40, 2, 500), 1))
        ),
        evaluation=evaluation(),
        self_test=self_test(),
        held_out_scores=[0.1, 0.2, 0.9],
        image_threshold=0.7,
        not_compared={"x-sm89.engine": "no such GPU"},
        latency=[LatencyRow("onnxruntime:cpu", "fp32", 40.0, 44.0, "frame to result", runs=50, where="2 cores")],
        examples=[example()],
        calibrated_with="onnxruntime:cpu",
        shown_with="the CPU",
    )
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def test_everything_given_is_shown() -> None:
    page = Page(render_report(full()))
    for part in (
        "zipper", "2025-05-06T12:00:00Z", "bundles/zipper", "./data", "nothing else in this report is simulated",
        "Half of the images were darker than usual.", "vit_small_patch14_dinov2", "ab" * 32, "0, 1", "0.001",
        "98.53 %", "97.00 %", "PRO-AUC: no masks", "PRO, area up to FPR 0.3: 95.61 %", "3.25", "100,000",
        "40 at the start, 2 after 500 steps", "3 min 4 s", "2.1e-06 of 1.0e-04", "5 of 6 large, strong ones", "2 glare",
        "good/004.jpg", "no such GPU", "40 ms", "25", "frame to result", "2 cores", "scratch/007.png", "the CPU",
        "most certain defect", "defective: image score 3 is above the image threshold 2",
        "saae-run bundles/zipper IMAGES",
        "parity passed: 1 artefact, 1 not checked",
    ):  # fmt: skip
        assert part in page.words, part
    assert sum(tag == "svg" for tag, _ in page.elements) == 6


def test_decisions_at_the_threshold_are_counted() -> None:
    words = Page(render_report(full())).words
    assert "normal, held out 3 1 1 false alarm" in words
    assert "test, good 2 1 1 false alarm" in words
    assert "test, defective 3 2 1 missed" in words


@pytest.mark.parametrize("given_", [True, False])
def test_labels_stand_where_they_are_true_and_nowhere_else(given_: bool) -> None:
    chosen = full(manifest=manifest(synthetic=given_), self_test=self_test() if given_ else None)
    page = Page(render_report(chosen))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert ({"synthetic", "simulated"} <= ids) == given_
    assert ("Synthetic demo data" in page.words) == given_
    assert ("pixel ROC-AUC (synthetic)" in page.words) == given_


def test_totals_of_the_self_test_weight_its_cells_alike() -> None:
    found = self_test()
    hard = dataclasses.replace(found.defects[0], size="small", contrast="faint", found=False, marked=False)
    words = Page(render_report(full(self_test=dataclasses.replace(found, defects=(*found.defects, hard))))).words
    # 5 of 6 large and strong are found, none of the other cell: half of 5/6, not 5 of 7.
    assert "all 0 of 1 - 5 of 6 0 of 1 - 5 of 6 42 % 50 %" in words
    assert "weight every kind, size and contrast equally: 42 % found" in words


def test_failed_parity_is_loud() -> None:
    failed = Artefact("model.fp16.onnx", "onnx", "fp16", parity=dataclasses.replace(PASSED, passed=False, flips=2))
    words = Page(render_report(full(manifest=manifest(artefacts=(failed,))))).words
    assert "Do not deploy" in words
    assert "parity failed: 1 of 1" in words
    assert "Do not deploy" not in Page(render_report(full())).words


def test_empty_report_says_what_is_missing() -> None:
    page = Page(render_report(Report(manifest(thresholds={}, artefacts=()))))
    for words in (
        "no test images were given", "parity not checked", "Latency was not measured", "No images were kept",
        "No thresholds were calibrated", "No image scores were recorded", "No simulated defects were tried",
        "The course of the fit was not recorded",
    ):  # fmt: skip
        assert words in page.words, words
    assert not any(tag in ("svg", "img") for tag, _ in page.elements)


def test_pictures_are_png_of_the_panels() -> None:
    shown = example(size=(640, 960))
    sources = [
        attributes["src"] or ""
        for tag, attributes in Page(render_report(full(examples=[shown], self_test=None))).elements
        if tag == "img"
    ]
    assert len(sources) == 4
    panels = []
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        panels.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    assert {panel.shape for panel in panels} == {(213, 320, 3)}
    small = example()
    page = Page(render_report(full(examples=[small], self_test=None)))
    data = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"][1].partition(",")[2]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), render.heatmap(small.anomaly_map, 1.0)
    )
    three = Page(render_report(full(examples=[example(truth=False)], self_test=None)))
    assert sum(tag == "img" for tag, _ in three.elements) == 3


def test_example_that_does_not_fit_is_named() -> None:
    wrong = dataclasses.replace(example(), frame=np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(FrameError):
        render_report(full(examples=[wrong]))


def test_page_needs_no_network_and_no_script() -> None:
    html = render_report(full())
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href") is None or (attributes["href"] or "").startswith("#")
        assert attributes.get("src") is None or (attributes["src"] or "").startswith("data:image/png;base64,")
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert all((attributes.get("href") or "#built")[1:] in ids for _, attributes in page.elements)


def shape_of(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in page.elements]


def filled_with(text: str) -> Report:
    """A report with the text in every place that a user or a file can fill."""
    found = manifest(
        category=text,
        created=text,
        backbone=Backbone(text, text, text),
        calibration=Calibration(3, text, True),
        tools={text: text},
        artefacts=(
            Artefact(text, "onnx", "fp32", parity=Parity(1, 1.0, 1.0, 1, 0.1, 0.1, False, text, text)),
            dataclasses.replace(ENGINE, file=f"{text}2"),
        ),
    )
    return full(
        manifest=dataclasses.replace(found, model=dataclasses.replace(found.model, loss=text, score=text, preset=text)),
        bundle=text,
        source=text,
        evaluation=evaluation(text, text),
        self_test=self_test(text),
        not_compared={f"{text}2": text},
        latency=[LatencyRow(text, text, 1.0, 2.0, text, where=text)],
        examples=[dataclasses.replace(example(size=(41, 43)), name=text, label=text, verdict=text)],
        calibrated_with=text,
        shown_with=text,
    )


PLAIN_SHAPE = shape_of(Page(render_report(filled_with("x"))))
hostile = st.one_of(
    st.sampled_from([
        "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "\"' onload='x", "{{ 7*7 }}{% for %}",
        "--><!--", "]]>", "&lt;b&gt;", "</svg><b>", "javascript:x", "\x00\x1b[31m", "\ud800", "\u202e", "a\nb\tc",
    ]),
    st.text(st.characters(), min_size=1, max_size=30),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(hostile)
def test_no_text_becomes_markup(text: str) -> None:
    html = render_report(filled_with(text))
    html.encode("utf-8")
    page = Page(html)
    shape = shape_of(page)
    # A digest is shown in another class; an empty text leaves its element out. Nothing else may differ.
    assert [tag for tag, _ in shape] == [tag for tag, _ in PLAIN_SHAPE] or not text.strip()
    allowed = {attribute for _, attributes in PLAIN_SHAPE for attribute in attributes}
    assert {attribute for _, attributes in shape for attribute in attributes} <= allowed
    if text.isprintable() and text == " ".join(text.split()):
        assert page.words.count(text) >= 20, "shown as it is"


def test_template_text_is_not_evaluated() -> None:
    html = render_report(filled_with("{{ 7*7 }}"))
    assert "{{ 7*7 }}" in html
    assert ">49<" not in html


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "bundle" / "report.html"
    write_report(target, full())
    assert target.read_text(encoding="utf-8") == render_report(full())
    before = target.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(StorageError):
        write_report(target, full(bundle="other"))
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_same_data_gives_the_same_bytes() -> None:
    assert render_report(full()) == render_report(full())


def test_size_stays_bounded_for_long_inputs() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.random(300_000))
    many = dataclasses.replace(evaluation(), curves=(dataclasses.replace(evaluation().curves[0], x=x, y=x),))
    record = FitRecord(loss=tuple(enumerate(rng.random(100_000).tolist())))
    long = full(examples=[], evaluation=many, record=record, held_out_scores=rng.random(50_000), self_test=None)
    assert len(render_report(long)) < 150_000


def test_report_needs_no_torch() -> None:
    code = "import sys, saae_export.report.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(html_module.__file__).parents[2]).returncode == 0


def test_style_has_a_dark_side() -> None:
    html = render_report(Report(manifest()))
    assert "prefers-color-scheme: dark" in html
    names = set(re.findall(r"var\((--[\w-]+)\)", html))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert names <= defined


def test_the_verdicts_are_the_first_tiles() -> None:
    page = render_report(full())
    tiles = re.findall(r'<div class="tile"><div class="value">([^<]*)</div><div class="name">([^<]*)</div>', page)
    assert tiles[0] == ("2 of 3", "defective images found (synthetic)")
    assert tiles[1] == ("1 of 2", "good images called defective (synthetic)")


def test_the_charts_of_thresholds_mark_the_default() -> None:
    page = render_report(full())
    for kind in ("pixels", "images"):
        chart = page[page.index(f"T of {kind} by acceptable FPR") :]
        assert "default 0.001" in chart[: chart.index("</svg>")]
