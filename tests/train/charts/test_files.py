"""Charts as files: the SVG stands alone, and the PNG shows the same things in the same places."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from saae_train.charts.files import chart_pixels, chart_svg, write_chart
from saae_train.charts.svg import bar_chart, histogram, rate_chart

BLUE, RED, WHITE = (58, 110, 168), (179, 38, 30), (255, 255, 255)
NAMES = {"title": "step", "x_label": "false-positive rate", "y_label": "true-positive rate"}
STEP = rate_chart([0, 0.25, 0.25, 1], [0, 0, 0.5, 0.5], limit=0.6, dot=(0.75, 0.5, "here"), **NAMES)  # type: ignore[arg-type]


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag.rpartition("}")[2] == tag]


def near(picture: np.ndarray, x: float, y: float, color: tuple[int, int, int]) -> bool:
    """Whether a color is found within a unit of (x, y) of the SVG's coordinates."""
    top = 30  # the heading's height
    patch = picture[round(2 * (y + top)) - 2 : round(2 * (y + top)) + 3, round(2 * x) - 2 : round(2 * x) + 3]
    return bool((np.abs(patch.astype(int) - color).max(axis=2) < 40).any())


def test_the_svg_needs_no_style_sheet() -> None:
    svg = chart_svg(STEP, "step <1> & more")
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "class=" not in svg.replace('class="chart"', "")
    (curve,) = elements(svg, "polyline")
    assert curve.attrib["stroke"] == "#3a6ea8"
    assert "step <1> & more" in [e.text for e in elements(svg, "text")]
    ground = elements(svg, "rect")[0].attrib
    assert ground["fill"] == "#ffffff"
    assert [float(ground[k]) for k in ("x", "y", "width", "height")] == [
        float(word) for word in root.attrib["viewBox"].split()
    ]


def test_the_png_shows_what_the_svg_says() -> None:
    picture = chart_pixels(STEP, "step")
    root = ElementTree.fromstring(STEP)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert picture.shape == (2 * (height + 30), 2 * width, 3)
    (curve,) = elements(STEP, "polyline")
    points = [tuple(map(float, pair.split(","))) for pair in curve.attrib["points"].split()]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        assert near(picture, (x0 + x1) / 2, (y0 + y1) / 2, BLUE)
    (dot,) = elements(STEP, "circle")
    assert near(picture, float(dot.attrib["cx"]), float(dot.attrib["cy"]), RED)
    mark = next(e for e in elements(STEP, "line") if e.attrib.get("class") == "mark").attrib
    assert near(picture, float(mark["x1"]), float(mark["y1"]) + 2, RED)
    assert near(picture, width - 30, 240, WHITE)  # nothing lies right of the step's lower half
    shade = next(e for e in elements(STEP, "rect")).attrib
    inside = float(shade["x"]) + 12, float(shade["y"]) + 40
    assert not near(picture, *inside, (120, 120, 120))
    assert tuple(picture[round(2 * (inside[1] + 30)), round(2 * inside[0])]) == (233, 239, 246)


def test_text_stands_where_the_svg_has_it() -> None:
    """Without its texts the chart differs around their places, and nowhere else."""
    bare = ElementTree.fromstring(STEP)
    removed = [e for e in bare if e.tag == "text"]
    for element in removed:
        bare.remove(element)
    differs = (chart_pixels(STEP) != chart_pixels(ElementTree.tostring(bare, encoding="unicode"))).any(axis=2)
    explained = np.zeros_like(differs)
    for element in removed:
        x, y = 2 * float(element.attrib["x"]), 2 * (float(element.attrib["y"]) + 30)
        length = 16 * len(element.text or "")
        box = (x - length, x + length, y - 30, y + 12)
        if "transform" in element.attrib:
            box = (x - 30, x + 12, y - length, y + length)
        left, right, top, bottom = (max(0, round(side)) for side in box)
        assert differs[top:bottom, left:right].any(), element.text
        explained[top:bottom, left:right] = True
    assert not (differs & ~explained).any()


@pytest.mark.parametrize(
    "svg",
    [
        histogram([("good", [0.1, 0.2, 0.2]), ("bad", [0.5])], title="t", x_label="score", threshold=0.3),
        bar_chart([("a", 1.0, 2.0, "1 ms")], title="t", x_label="ms"),
    ],
)
def test_every_kind_of_chart_can_be_written(svg: str, tmp_path: Path) -> None:
    files = write_chart(tmp_path / "deep" / "chart", svg, "heading")
    assert [path.name for path in files] == ["chart.svg", "chart.png"]
    ElementTree.fromstring(files[0].read_text())
    with Image.open(files[1]) as image:
        found = np.asarray(image)
    assert (np.abs(found.astype(int) - BLUE).max(axis=2) < 10).sum() > 500
