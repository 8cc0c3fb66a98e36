"""Draws the figures of docs/method.md, by the code's own rules where there are any: python docs/figures.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import numpy as np
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from saae_runtime.estimate import ScoreModel  # noqa: E402
from saae_runtime.files import write_text  # noqa: E402
from saae_train.charts.files import chart_svg  # noqa: E402
from saae_train.charts.svg import Series, histogram, line_chart  # noqa: E402
from saae_train.model.tiles import Tiles  # noqa: E402

_INK, _LINE, _FILL, _ACCENT, _GROUND = "#1f2933", "#52606d", "#e3f2ef", "#00796b", "#ffffff"


class Drawing:
    """An SVG of boxes, arrows and words, on a white ground so that it reads on a dark page, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {width} {height}",
                "width": str(width),
                "height": str(height),
                "role": "img",
                "font-family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
                "font-size": "13",
            },
        )
        ElementTree.SubElement(self.root, "title").text = title
        self.rectangle(0, 0, width, height, fill=_GROUND, stroke="none")

    def rectangle(self, x: float, y: float, width: float, height: float, **looks: str) -> None:
        numbers = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
        ElementTree.SubElement(self.root, "rect", {**numbers, "fill": _FILL, "stroke": _LINE, **looks})

    def words(self, x: float, y: float, lines: Sequence[str], anchor: str = "middle", **looks: str) -> None:
        for index, line in enumerate(lines):
            place = {"x": f"{x:g}", "y": f"{y + 17 * index:g}", "text-anchor": anchor, "fill": _INK}
            ElementTree.SubElement(self.root, "text", {**place, **looks}).text = line

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str], **looks: str) -> None:
        self.rectangle(x, y, width, height, rx="5", **looks)
        self.words(x + width / 2, y + height / 2 + 5 - 8.5 * (len(lines) - 1), lines)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points, with a head at the last; the last piece is level or upright."""
        (x0, y0), (x1, y1) = points[-2:]
        across, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        corners = [(x1, y1), (x1 - 8 * across + 4 * down, y1 - 8 * down + 4 * across)]
        corners.append((x1 - 8 * across - 4 * down, y1 - 8 * down - 4 * across))
        for name, places, looks in (
            ("polyline", points, {"fill": "none", "stroke": _LINE, "stroke-width": "1.5"}),
            ("polygon", corners, {"fill": _LINE}),
        ):
            text = " ".join(f"{x:g},{y:g}" for x, y in places)
            ElementTree.SubElement(self.root, name, {"points": text, **looks})

    def text(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"


def graph() -> str:
    """What is in the one graph, from the frame to the mask."""
    page = Drawing(760, 250, "From the frame to map, score and mask, in one graph")
    page.rectangle(98, 14, 566, 222, fill="none", stroke=_ACCENT, **{"stroke-dasharray": "6 4", "rx": "8"})
    page.words(112, 34, ["one exported graph"], anchor="start", fill=_ACCENT)
    page.box(10, 90, 70, 50, ["frame"], fill=_GROUND)
    page.box(112, 90, 92, 50, ["resize,", "normalise"])
    page.box(226, 90, 84, 50, ["frozen", "ViT"])
    page.box(332, 90, 100, 50, ["features g", "per patch"])
    page.box(454, 48, 108, 50, ["autoencoder", "(SAAE)"])
    page.box(454, 134, 108, 50, ["memory of", "normal patches"])
    page.box(574, 90, 82, 50, ["score map,", "upsample"])
    page.box(684, 36, 66, 36, ["map A"], fill=_GROUND)
    page.box(684, 97, 66, 36, ["score"], fill=_GROUND)
    page.box(684, 158, 66, 36, ["mask"], fill=_GROUND)
    page.arrow((80, 115), (112, 115))
    page.arrow((204, 115), (226, 115))
    page.arrow((310, 115), (332, 115))
    page.arrow((432, 107), (443, 107), (443, 73), (454, 73))
    page.arrow((432, 123), (443, 123), (443, 159), (454, 159))
    page.arrow((562, 73), (615, 73), (615, 90))
    page.arrow((562, 159), (615, 159), (615, 140))
    page.arrow((656, 107), (670, 107), (670, 54), (684, 54))
    page.arrow((656, 115), (684, 115))
    page.arrow((656, 123), (670, 123), (670, 176), (684, 176))
    page.words(506, 204, ["how far is g from what is usual,"], **{"font-size": "11"})
    page.words(506, 219, ["measured by how far normal patches lie there"], **{"font-size": "11"})
    page.words(506, 42, ["is g as usual at this place?"], **{"font-size": "11"})
    return page.text()


def threshold() -> str:
    """The image threshold by its own code, on drawn scores of 80 good images."""
    generator = np.random.default_rng(4)
    scores = np.round(np.exp(generator.normal(0.0, 0.16, 80)), 4)
    model = ScoreModel.fit(scores.tolist())
    chart = histogram(
        [("80 good images", scores)],
        title="Scores of good images and the threshold estimated from them",
        x_label="score (drawn numbers)",
        threshold=model.threshold(0.05),
    )
    return chart_svg(chart, "The threshold for 5 false alarms in 100")


def rule() -> str:
    """One rule for verdict and mask, on a line through a drawn map."""
    x = np.arange(0, 241, 2.0)
    course = (
        0.18 + 0.03 * np.sin(x / 9) + 0.62 * np.exp(-(((x - 70) / 14) ** 2)) + 0.30 * np.exp(-(((x - 170) / 16) ** 2))
    )
    chart = line_chart(
        [
            Series("map along a line", x, course),
            Series("image threshold", x[[0, -1]], np.array([0.6, 0.6])),
            Series("pixel threshold T", x[[0, -1]], np.array([0.35, 0.35])),
        ],
        title="Which area is outlined",
        x_label="pixel (drawn numbers)",
        y_label="map",
        y_range=(0.0, 1.0),
    )
    return chart_svg(chart, "The left area is outlined, the right one is not")


def tiles() -> str:
    """The windows of --tiles 2x3 by the code that places them."""
    layout = Tiles.over((24, 24), (2, 3))
    rows, columns = layout.grid
    step = 420 / columns
    page = Drawing(460, round(rows * step) + 60, "The windows of --tiles 2x3")
    page.words(20, 24, [f"2 x 3 windows of 24 x 24 positions; one grid of {rows} x {columns}"], anchor="start")
    page.rectangle(20, 40, columns * step, rows * step, fill=_GROUND)
    for row, column in layout.places():
        looks = {"fill": _ACCENT, "fill-opacity": "0.18", "stroke": _ACCENT}
        page.rectangle(
            round(20 + column * step, 1), round(40 + row * step, 1), round(24 * step, 1), round(24 * step, 1), **looks
        )
    return page.text()


FIGURES = {"graph": graph, "threshold": threshold, "rule": rule, "tiles": tiles}


def main(folder: Annotated[Path, typer.Argument(help="of the figures")] = ROOT / "docs/figures") -> None:
    """Write every figure of the documentation into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        write_text(folder / f"{name}.svg", draw())


if __name__ == "__main__":
    typer.run(main)
