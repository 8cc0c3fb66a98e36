"""Charts as SVG and PNG files, both drawn from the same elements.

`charts` draws without colours, for a page with a style sheet. Here every element gets its colours as attributes, the
title stands above, and the background is white. Pillow draws the PNG from those attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from saae_runtime.files import write_text
from saae_runtime.render import font_of_size, save_png

__all__ = ["chart_pixels", "chart_svg", "write_chart"]

_HEAD = 30
_FONT, _HEAD_FONT = 12, 15
_SCALE, _FINER = 2, 2
"""Pixels of the PNG per unit of the chart, and the factor by which it is drawn larger before it is reduced."""

_INK, _SOFT, _GROUND = "#1d2129", "#5b6472", "#ffffff"
_SERIES = {"s1": "#3a6ea8", "s2": "#2f9e6e", "s3": "#c8442f", "s4": "#8a5fb0"}
_MARK = "#b3261e"

_LOOKS: Mapping[str, Mapping[str, str]] = {
    "shade": {"fill": "#e9eff6"},
    "grid": {"stroke": "#e1e4e8", "stroke-width": "1"},
    "axis": {"stroke": _SOFT, "stroke-width": "1"},
    "chance": {"stroke": "#9aa1ab", "stroke-width": "1", "stroke-dasharray": "2 5"},
    "line": {"fill": "none", "stroke": _INK, "stroke-width": "2", "stroke-linejoin": "round"},
    "tail": {"stroke": _INK, "stroke-width": "1.5"},
    "mark": {"stroke": _MARK, "stroke-width": "1.5", "stroke-dasharray": "5 3"},
    "mark-dot": {"fill": _MARK},
    "tick": {"fill": _SOFT},
    "label": {"fill": _SOFT},
    "key": {"fill": _INK},
    "mark-label": {"fill": _MARK},
    "middle": {"text-anchor": "middle"},
    "end": {"text-anchor": "end"},
    "start": {"text-anchor": "start"},
}


def _styled(svg: str, heading: str) -> ElementTree.Element:
    """The chart with its colours as attributes, a heading above and a white background."""
    chart = ElementTree.fromstring(svg)
    _, _, width, height = (float(word) for word in chart.attrib["viewBox"].split())
    for element in chart.iter():
        for name in element.attrib.pop("class", "").split():
            looks = dict(_LOOKS.get(name, {}))
            if name in _SERIES:
                filled = element.tag in ("rect", "circle")
                looks["fill" if filled else "stroke"] = _SERIES[name]
            element.attrib.update(looks)
        if element.tag == "text":
            element.attrib.setdefault("font-size", str(_FONT))
    ground = {"x": "0", "y": f"{-_HEAD}", "width": f"{width:g}", "height": f"{height + _HEAD:g}", "fill": _GROUND}
    chart.insert(1, ElementTree.Element("rect", ground))
    above = {"x": "14", "y": "-10", "fill": _INK, "font-size": str(_HEAD_FONT)}
    title = ElementTree.SubElement(chart, "text", above)
    title.text = heading
    chart.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 {-_HEAD} {width:g} {height + _HEAD:g}",
            "width": f"{width:g}",
            "height": f"{height + _HEAD:g}",
            "font-family": "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        }
    )
    return chart


def chart_svg(svg: str, heading: str = "") -> str:
    """A chart of `charts` as a whole SVG document.

    Args:
        svg: not empty.
        heading: a line above it.
    """
    return ElementTree.tostring(_styled(svg, heading), encoding="unicode") + "\n"


def chart_pixels(svg: str, heading: str = "") -> NDArray[np.uint8]:
    """A chart of `charts` as a picture, two pixels per unit.

    Args:
        svg: not empty.
        heading: a line above it.

    Returns:
        uint8 height x width x 3 RGB.
    """
    from PIL import Image, ImageDraw

    chart = _styled(svg, heading)
    _, top, width, height = (float(word) for word in chart.attrib["viewBox"].split())
    scale = _SCALE * _FINER
    page = Image.new("RGB", (round(width * scale), round(height * scale)), _GROUND)
    pen = ImageDraw.Draw(page)
    for element in chart:
        _draw(page, pen, element, scale, -top)
    small = page.resize((round(width * _SCALE), round(height * _SCALE)), Image.Resampling.BOX)
    return np.asarray(small)


def _draw(page: Any, pen: Any, element: ElementTree.Element, scale: float, down: float) -> None:
    get = element.attrib.get

    def place(x: str, y: str) -> tuple[float, float]:
        return float(element.attrib[x]) * scale, (float(element.attrib[y]) + down) * scale

    width = max(1, round(float(get("stroke-width", "1")) * scale))
    if element.tag == "rect":
        x, y = place("x", "y")
        right, bottom = x + float(element.attrib["width"]) * scale, y + float(element.attrib["height"]) * scale
        if right - x >= 1 and bottom - y >= 1:
            pen.rectangle((x, y, right - 1, bottom - 1), fill=get("fill", _INK))
    elif element.tag == "line":
        dashes = [float(word) * scale for word in get("stroke-dasharray", "").split()]
        for piece in _pieces(place("x1", "y1"), place("x2", "y2"), dashes):
            pen.line(piece, fill=get("stroke", _INK), width=width)
    elif element.tag == "polyline":
        points = [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]
        pen.line([(x * scale, (y + down) * scale) for x, y in points], get("stroke", _INK), width, joint="curve")
    elif element.tag == "circle":
        x, y = place("cx", "cy")
        radius = float(element.attrib["r"]) * scale
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=get("fill", _INK))
    elif element.tag == "text" and element.text:
        _write(page, pen, element, place("x", "y"), scale)


def _pieces(
    start: tuple[float, float], end: tuple[float, float], dashes: list[float]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """A straight line, in dashes if it is dashed."""
    length = math.dist(start, end)
    if not dashes or length == 0:
        return [(start, end)]

    def at(distance: float) -> tuple[float, float]:
        share = min(distance / length, 1.0)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    on, off = dashes
    count = math.ceil(length / (on + off))
    return [(at(index * (on + off)), at(index * (on + off) + on)) for index in range(count)]


def _write(page: Any, pen: Any, element: ElementTree.Element, place: tuple[float, float], scale: float) -> None:
    from PIL import Image, ImageDraw

    font = font_of_size(round(float(element.attrib["font-size"]) * scale))
    fill, text = element.attrib.get("fill", _INK), element.text or ""
    anchor = {"middle": "m", "end": "r"}.get(element.attrib.get("text-anchor", ""), "l") + "s"
    if "transform" not in element.attrib:
        pen.text(place, text, fill=fill, font=font, anchor=anchor)
        return
    # The only turned text is an axis label: a quarter turn to the left about its middle.
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font, anchor="ms")
    mask = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font, anchor="ms")
    turned = mask.rotate(90, expand=True)
    x, y = place
    page.paste(fill, (round(x + top), round(y - turned.height / 2)), turned)


def write_chart(stem: Path, svg: str, heading: str = "") -> list[Path]:
    """Write a chart as `stem`.svg and `stem`.png, atomically; return both.

    Raises:
        StorageError: the disk is full, or the place may not be written to.
    """
    files = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    write_text(files[0], chart_svg(svg, heading))
    save_png(files[1], chart_pixels(svg, heading))
    return files
