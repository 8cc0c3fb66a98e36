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

from saae_export.report import html as report
from saae_export.report.html import (
    Curve,
    Example,
    Facts,
    FitHistory,
    LatencyRow,
    MetricRow,
    ParityRow,
    ReportData,
    Scores,
    ThresholdSet,
    render_report,
    write_report,
)
from saae_runtime import files, render
from saae_runtime.errors import FrameError, StorageError
from saae_runtime.manifest import Parity
from saae_runtime.thresholds import ThresholdTable

TABLE = ThresholdTable((0.0, 0.001, 0.1, 1.0), (4.0, 3.25, 2.0, 0.5), 0.001, 100_000)
PASSED = Parity(12, 2.1e-6, 1.3e-6, 0, 1e-4, 1e-4, True, "good/004.jpg", "PyTorch fp32")


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


def full(**changes: object) -> ReportData:
    data = ReportData(
        category="zipper",
        created="2025-05-06T12:00:00Z",
        bundle="bundles/zipper",
        synthetic=True,
        simulated=["The GPU figures were not measured."],
        notes=["Half of the images were darker than usual."],
        facts=[
            Facts("Backbone", {"name": "vit_small_patch14_dinov2", "sha256": "ab" * 32, "layers": [3, 4], "cut": True}),
            Facts("Model", {"V": 60, "rate": 0.001, "components": None, "sizes": {"h": 28, "w": 28}}),
        ],
        thresholds=[ThresholdSet("fp32", TABLE, TABLE), ThresholdSet("fp16", TABLE)],
        scores=Scores([0.1, 0.2, 0.9], [0.3, 0.8], [0.4, 1.5, 1.75], threshold=0.7),
        metrics=[
            MetricRow("overall", {"pixel ROC-AUC": 0.98534, "PRO-AUC": None}, 5, {"PRO-AUC": "no masks"}),
            MetricRow("scratch", {"pixel ROC-AUC": 0.97, "image ROC-AUC": 1.0}),
        ],
        curves=[Curve("PRO", [0, 0.5, 1], [0, 0.9, 1], y_label="overlap", area=0.9561, limit=0.3)],
        fit=FitHistory(np.geomspace(40, 2, 500), seconds=184.0, stopped="the loss no longer fell"),
        parity=[ParityRow("model.onnx", "fp32", PASSED), ParityRow("x-sm89.engine", "fp16", why_not="no such GPU")],
        latency=[LatencyRow("onnxruntime:cpu", "fp32", 40.0, 44.0, "frame to result", runs=50, where="2 cores")],
        worst=[example()],
        missing={},
        next_commands=[("score a folder", "saae-run bundles/zipper images/")],
    )
    return dataclasses.replace(data, **changes)


def test_everything_given_is_shown() -> None:
    page = Page(render_report(full()))
    for part in (
        "zipper", "2025-05-06T12:00:00Z", "bundles/zipper", "The GPU figures were not measured.",
        "Half of the images were darker than usual.", "vit_small_patch14_dinov2", "ab" * 32, "3, 4", "yes", "0.001",
        "h 28, w 28", "98.53 %", "97.00 %", "PRO-AUC: no masks", "PRO, area up to FPR 0.3 95.61 %", "3.25", "100,000",
        "40 at the start, 2 after 500 steps", "3 min 4 s", "the loss no longer fell", "2.1e-06 of 1.0e-04",
        "good/004.jpg", "no such GPU", "40 ms", "25", "frame to result", "2 cores", "scratch/007.png",
        "most certain defect", "score 3 > T 2: defect", "saae-run bundles/zipper images/",
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
    page = Page(render_report(full(synthetic=given_, simulated=["x"] if given_ else [])))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert ({"synthetic", "simulated"} <= ids) == given_
    assert ("Synthetic demo data" in page.words) == given_
    assert ("pixel ROC-AUC (synthetic)" in page.words) == given_


def test_failed_parity_is_loud() -> None:
    failed = dataclasses.replace(PASSED, passed=False, flips=2)
    words = Page(render_report(full(parity=[ParityRow("model.fp16.onnx", "fp16", failed)]))).words
    assert "Do not deploy" in words
    assert "parity failed: 1 of 1" in words
    assert "Do not deploy" not in Page(render_report(full())).words


def test_empty_report_says_what_is_missing_and_why() -> None:
    page = Page(render_report(ReportData("zipper", missing={"metrics": "no defect images were given"})))
    assert "no defect images were given" in page.words
    assert "parity not checked" in page.words
    for word in ("Latency was not measured", "No thresholds were calibrated", "No images were kept"):
        assert word in page.words
    assert not any(tag in ("svg", "img") for tag, _ in page.elements)


@pytest.mark.parametrize("name", ["facts", "thresholds", "scores", "metrics", "curves", "fit", "parity", "latency"])
def test_each_part_can_be_left_out(name: str) -> None:
    empty = getattr(ReportData("x"), name)
    words = Page(render_report(full(**{name: empty}, missing={name: "left out on purpose"}))).words
    assert "left out on purpose" in words


def test_pictures_are_png_of_the_panels() -> None:
    shown = example(size=(640, 960))
    sources = [
        attributes["src"] or "" for tag, attributes in Page(render_report(full(worst=[shown]))).elements if tag == "img"
    ]
    assert len(sources) == 4
    panels = []
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        panels.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    assert {panel.shape for panel in panels} == {(213, 320, 3)}
    small = example()
    page = Page(render_report(full(worst=[small])))
    data = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"][1].partition(",")[2]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), render.heatmap(small.anomaly_map, 1.0)
    )
    three = Page(render_report(full(worst=[example(truth=False)])))
    assert sum(tag == "img" for tag, _ in three.elements) == 3


def test_example_that_does_not_fit_is_named() -> None:
    wrong = dataclasses.replace(example(), frame=np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(FrameError):
        render_report(full(worst=[wrong]))


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


def filled_with(text: str) -> ReportData:
    """A report with the text in every place that a user can fill."""
    return ReportData(
        category=text, created=text, bundle=text, synthetic=True, simulated=[text], notes=[text],
        facts=[Facts(text, {text: text, "list": [text], "map": {text: text}})],
        thresholds=[ThresholdSet(text, TABLE, TABLE), ThresholdSet(text, TABLE)],
        scores=Scores([1.0, 2.0], threshold=1.5, held_out_label=text),
        metrics=[MetricRow(text, {text: 0.5, "other": None}, 3, {text: text})],
        curves=[Curve(text, [0, 1], [0, 1], x_label=text, y_label=text, area=0.5)],
        fit=FitHistory([2.0, 1.0], unit=text, seconds=1.0, stopped=text),
        parity=[
            ParityRow(text, text, Parity(1, 1.0, 1.0, 1, 0.1, 0.1, False, text, text)),
            ParityRow(text, text, None, text),
        ],
        latency=[LatencyRow(text, text, 1.0, 2.0, text, where=text)],
        worst=[dataclasses.replace(example(size=(41, 43)), name=text, label=text, verdict=text)],
        missing={"curves": text},
        next_commands=[(text, text)],
    )  # fmt: skip


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
        write_report(target, full(category="other"))
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_same_data_gives_the_same_bytes() -> None:
    assert render_report(full()) == render_report(full())


def test_size_stays_bounded_for_long_inputs() -> None:
    rng = np.random.default_rng(0)
    x = np.sort(rng.random(300_000))
    long = full(
        worst=[], curves=[Curve("ROC", x, x)], fit=FitHistory(rng.random(100_000)),
        scores=Scores(rng.random(50_000), threshold=0.5),
    )  # fmt: skip
    assert len(render_report(long)) < 150_000


def test_report_needs_no_torch() -> None:
    code = "import sys, saae_export.report.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(report.__file__).parents[2]).returncode == 0


def test_style_has_a_dark_side() -> None:
    html = render_report(ReportData("x"))
    assert "prefers-color-scheme: dark" in html
    names = set(re.findall(r"var\((--[\w-]+)\)", html))
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert names <= defined
