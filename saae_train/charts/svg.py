"""Charts as SVG elements: for a page whose style sheet colours them, or for `charts.files`.

Built as an element tree, so every label is escaped by construction. Classes `s1` to `s4` are the series' colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

__all__ = ["Floats", "Series", "bar_chart", "histogram", "line_chart", "plain_text", "rate_chart", "smooth", "ticks"]

Floats = npt.NDArray[np.floating] | Sequence[float]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 62, 18, 26, 46
_MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: its name in the legend.
        x, y: equally many numbers; points that are not finite are left out.
    """

    label: str
    x: Floats
    y: Floats


@dataclass(frozen=True)
class _Scale:
    """Maps values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((last - first) / 6))
        return [10.0**power for power in range(first, last + 1, step)]


def plain_text(value: object) -> str:
    """A value as text that any UTF-8 document can hold: lone surrogates and control characters made visible."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        letter if letter >= " " and not "\x7f" <= letter <= "\x9f" else "\N{REPLACEMENT CHARACTER}"
        for letter in text.replace("\n", " ").replace("\t", " ")
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    if power == 0.0:
        return [low]
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def smooth(values: Floats, most: int = 300) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A long series as at most `most` means of equal stretches.

    Returns:
        (index of each stretch's middle, from 0; mean of its finite values), float64.
    """
    course = np.asarray(values, np.float64).reshape(-1)
    stretches = np.array_split(np.arange(course.size), min(most, max(course.size, 1)))
    kept = [part[np.isfinite(course[part])] for part in stretches]
    kept = [part for part in kept if part.size]
    return np.array([part.mean() for part in kept]), np.array([course[part].mean() for part in kept])


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_log: bool = False,
    y_log: bool = False,
    x_mark: tuple[float, str] | None = None,
    shade_to: float | None = None,
    diagonal: bool = False,
    dot: tuple[float, float, str] | None = None,
) -> str:
    """Lines over two axes.

    Args:
        series: at most four lines; a legend is drawn for two or more.
        x_range, y_range: axis ends; None fits them to the data.
        x_log, y_log: logarithmic axes (values at or below zero are left out).
        x_mark: a vertical line and its label.
        shade_to: shades the plot from the left up to this x.
        diagonal: draws the line of chance.
        dot: a marked point (x, y) and its label.

    Returns:
        SVG text; empty where no point can be drawn.
    """
    cleaned = [(line.label, *_finite(line.x, line.y, x_log, y_log)) for line in series]
    cleaned = [entry for entry in cleaned if entry[1].size]
    if not cleaned:
        return ""
    low_x, high_x = x_range or _ends(np.concatenate([x for _, x, _ in cleaned]), x_log)
    low_y, high_y = y_range or _ends(np.concatenate([y for _, _, y in cleaned]), y_log)
    height = 300
    across = _Scale(low_x, high_x, _LEFT, _WIDTH - _RIGHT, x_log)
    up = _Scale(low_y, high_y, height - _BOTTOM, _TOP, y_log)
    svg = _canvas(height, title)
    if shade_to is not None:
        right = across(min(shade_to, high_x))
        _add(svg, "rect", "shade", x=_LEFT, y=_TOP, width=right - _LEFT, height=height - _BOTTOM - _TOP)
    _axes(svg, across, up, height, x_label, y_label)
    if diagonal:
        _add(svg, "line", "chance", x1=across(low_x), y1=up(low_y), x2=across(high_x), y2=up(high_y))
    for number, (label, x, y) in enumerate(cleaned, start=1):
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(*_thinned(x, y, across, up), strict=True))
        if x.size == 1:
            _add(svg, "circle", f"dot s{number}", cx=across(x[0]), cy=up(y[0]), r=3)
        else:
            _add(svg, "polyline", f"line s{number}", points=points)
        if len(cleaned) > 1:
            left = _LEFT + 8 + (number - 1) * (_WIDTH - _LEFT - _RIGHT) / len(cleaned)
            _add(svg, "line", f"line s{number}", x1=left, y1=12, x2=left + 18, y2=12)
            _add(svg, "text", "key", label, x=left + 24, y=16)
    if x_mark is not None and low_x <= x_mark[0] <= high_x:
        _mark(svg, across(x_mark[0]), _TOP, height - _BOTTOM, x_mark[1])
    if dot is not None:
        _dot(svg, across(dot[0]), up(dot[1]), height - _BOTTOM, dot[2])
    return ElementTree.tostring(svg, encoding="unicode")


def rate_chart(
    x: Floats,
    y: Floats,
    *,
    title: str,
    x_label: str,
    y_label: str,
    limit: float | None = None,
    chance: bool = True,
    dot: tuple[float, float, str] | None = None,
) -> str:
    """One curve over two rates, both axes 0 to 1: ROC, region overlap, precision-recall.

    Args:
        x, y: the curve.
        limit: the x up to which its area counts, shaded and marked.
        chance: draws the diagonal, what guessing gives.
        dot: a marked point (x, y) and its label.

    Returns:
        SVG text, see `line_chart`.
    """
    return line_chart(
        [Series(title, x, y)],
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        x_mark=None if limit is None else (limit, f"{100 * limit:g} %"),
        shade_to=limit,
        diagonal=chance,
        dot=dot,
    )


def histogram(groups: Sequence[tuple[str, Floats]], *, title: str, x_label: str, threshold: float | None) -> str:
    """Histograms of several groups, one above the other over one axis, the threshold through all of them.

    Args:
        groups: (name, values); empty groups are left out, values that are not finite are not drawn.
        threshold: where the decision falls; None draws no line.

    Returns:
        SVG text; empty if there is nothing to draw.
    """
    arrays = [(name, np.asarray(values, np.float64).reshape(-1)) for name, values in groups]
    finite = [(name, values, values[np.isfinite(values)]) for name, values in arrays]
    finite = [entry for entry in finite if entry[2].size]
    if not finite:
        return ""
    line = threshold if threshold is not None and math.isfinite(threshold) else None
    everything = np.concatenate([kept for _, _, kept in finite] + ([np.array([line])] if line is not None else []))
    low, high = _ends(everything, False)
    edges = np.linspace(low, high, 41)
    row, between = 64, 26
    height = _TOP + len(finite) * (row + between) + _BOTTOM - 6
    across = _Scale(low, high, _LEFT, _WIDTH - _RIGHT)
    svg = _canvas(height, title)
    floor, keys = _TOP, []
    for number, (name, values, kept) in enumerate(finite, start=1):
        counts, _ = np.histogram(kept, edges)
        floor += row + between
        summary = f"{name}: {values.size}"
        if line is not None:
            summary += f", {int((values > line).sum())} above T"
        if kept.size < values.size:
            summary += f", {values.size - kept.size} not finite"
        keys.append((summary, floor - row - 8))
        for index, count in enumerate(counts):
            if count:
                left, right = across(edges[index]), across(edges[index + 1])
                tall = max(1.5, row * count / counts.max())
                bar = _add(
                    svg, "rect", f"bar s{number}", x=left + 0.5, y=floor - tall, width=right - left - 1, height=tall
                )
                _add(bar, "title", "", f"{edges[index]:.4g} to {edges[index + 1]:.4g}: {count}")
        _add(svg, "line", "axis", x1=_LEFT, y1=floor, x2=_WIDTH - _RIGHT, y2=floor)
        _add(svg, "text", "tick end", str(counts.max()), x=_LEFT - 8, y=floor - row + 10)
    for value in across.ticks():
        _add(svg, "text", "tick middle", _number(value), x=across(value), y=floor + 16)
    _add(svg, "text", "label middle", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=floor + 36)
    if line is not None:
        _mark(svg, across(line), 4, floor, f"T {line:.4g}")
    for summary, y in keys:  # last, so that the threshold's line passes behind them
        _add(svg, "text", "key", summary, x=_LEFT, y=y)
    return ElementTree.tostring(svg, encoding="unicode")


def bar_chart(rows: Sequence[tuple[str, float, float, str]], *, title: str, x_label: str) -> str:
    """Horizontal bars from zero, each with a tick at a second, larger value.

    Args:
        rows: (name, value, second value, text at the bar's end).

    Returns:
        SVG text; empty if there is nothing to draw.
    """
    drawn = [entry for entry in rows if math.isfinite(entry[1]) and math.isfinite(entry[2]) and entry[1] > 0]
    if not drawn:
        return ""
    row = 44
    height = 8 + len(drawn) * row + _BOTTOM
    across = _Scale(0.0, 1.12 * max(max(value, second) for _, value, second, _ in drawn), 12, _WIDTH - _RIGHT)
    svg = _canvas(height, title)
    for number, (name, value, second, text) in enumerate(drawn):
        top = 8 + number * row
        _add(svg, "text", "key", name, x=12, y=top + 12)
        _add(svg, "text", "tick end", text, x=_WIDTH - _RIGHT, y=top + 12)
        _add(svg, "rect", "bar s1", x=12, y=top + 18, width=across(value) - 12, height=14)
        _add(svg, "line", "tail", x1=across(value), y1=top + 25, x2=across(second), y2=top + 25)
        _add(svg, "line", "tail", x1=across(second), y1=top + 19, x2=across(second), y2=top + 31)
    floor = 8 + len(drawn) * row + 2
    _add(svg, "line", "axis", x1=12, y1=floor, x2=_WIDTH - _RIGHT, y2=floor)
    for value in across.ticks():
        _add(svg, "text", "tick middle", _number(value), x=across(value), y=floor + 16)
    _add(svg, "text", "label middle", x_label, x=_WIDTH / 2, y=floor + 34)
    return ElementTree.tostring(svg, encoding="unicode")


def _finite(x: Floats, y: Floats, x_log: bool, y_log: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(x, np.float64).reshape(-1), np.asarray(y, np.float64).reshape(-1)
    shared = min(a.size, b.size)
    a, b = a[:shared], b[:shared]
    keep = np.isfinite(a) & np.isfinite(b)
    if x_log:
        keep &= a > 0
    if y_log:
        keep &= b > 0
    return a[keep], b[keep]


def _ends(values: NDArray[np.float64], log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return (low / 2, high * 2) if low == high else (low, high)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    # All values at or above zero: the axis does not go below it.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], across: _Scale, up: _Scale
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most _MOST_POINTS of a curve's points, evenly along its drawn length, so that steep parts keep theirs."""
    if x.size <= _MOST_POINTS:
        return x, y
    drawn_x = np.array([across(value) for value in x]) if across.log else x / (across.high - across.low)
    drawn_y = np.array([up(value) for value in y]) if up.log else y / (up.high - up.low)
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(drawn_x)) + np.abs(np.diff(drawn_y)))])
    wanted = np.linspace(0.0, length[-1], _MOST_POINTS)
    index = np.unique(np.concatenate([np.searchsorted(length, wanted).clip(0, x.size - 1), [x.size - 1]]))
    return x[index], y[index]


def _canvas(height: float, title: str) -> ElementTree.Element:
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {_WIDTH} {height:g}", "role": "img", "class": "chart"})
    _add(svg, "title", "", title)
    return svg


def _add(parent: ElementTree.Element, name: str, css: str, text: str = "", **attributes: object) -> ElementTree.Element:
    values = {
        key: (f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value))
        for key, value in attributes.items()
    }
    if css:
        values["class"] = css
    child = ElementTree.SubElement(parent, name, values)
    if text:
        child.text = plain_text(text)
    return child


def _axes(svg: ElementTree.Element, across: _Scale, up: _Scale, height: float, x_label: str, y_label: str) -> None:
    floor = height - _BOTTOM
    for value in up.ticks():
        _add(svg, "line", "grid", x1=_LEFT, y1=up(value), x2=_WIDTH - _RIGHT, y2=up(value))
        _add(svg, "text", "tick end", _number(value), x=_LEFT - 8, y=up(value) + 4)
    for value in across.ticks():
        _add(svg, "line", "grid", x1=across(value), y1=_TOP, x2=across(value), y2=floor)
        _add(svg, "text", "tick middle", _number(value), x=across(value), y=floor + 18)
    _add(svg, "line", "axis", x1=_LEFT, y1=floor, x2=_WIDTH - _RIGHT, y2=floor)
    _add(svg, "text", "label middle", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=height - 8)
    middle = (_TOP + floor) / 2
    _add(svg, "text", "label middle", y_label, x=14, y=middle, transform=f"rotate(-90 14 {middle:g})")


def _mark(svg: ElementTree.Element, x: float, top: float, bottom: float, label: str) -> None:
    _add(svg, "line", "mark", x1=x, y1=top, x2=x, y2=bottom)
    side, offset = ("end", -6) if x > 0.6 * _WIDTH else ("start", 6)
    _add(svg, "text", f"mark-label {side}", label, x=x + offset, y=top + 12)


def _dot(svg: ElementTree.Element, x: float, y: float, floor: float, label: str) -> None:
    """A marked point with its label below it, on the side that has room."""
    _add(svg, "circle", "dot mark-dot", cx=x, cy=y, r=4)
    side, offset = ("end", -8) if x > 0.5 * _WIDTH else ("start", 8)
    _add(svg, "text", f"mark-label {side}", label, x=x + offset, y=min(y + 20, floor - 8))


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"
