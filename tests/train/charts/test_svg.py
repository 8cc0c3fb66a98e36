"""The charts: scales, thinning, what is drawn where, and what is left out."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saae_train.charts.svg import Series, bar_chart, histogram, line_chart, plain_text, smooth, ticks

number = st.floats(-1e12, 1e12, allow_nan=False)
anything = st.floats(allow_nan=True, allow_infinity=True, width=32)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parse(svg).iter("text")]


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
        for line in parse(svg).iter("polyline")
    ]


@given(number, st.floats(1e-6, 1e12))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return  # closer together than the labels can tell
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    slack = 1e-6 * (high - low)
    assert all(low - slack <= value <= high + slack for value in found)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    mantissa = steps[0] / 10.0 ** math.floor(math.log10(steps[0] * 1.0001))
    assert any(mantissa == pytest.approx(round_, rel=1e-2) for round_ in (1, 2, 5, 10))


@given(st.lists(anything, max_size=2000), st.integers(1, 50))
def test_smoothing_keeps_the_mean_of_equal_stretches(values: list[float], most: int) -> None:
    at, means = smooth(values, most)
    assert at.size == means.size <= most
    assert np.all(np.diff(at) > 0)
    finite = np.array([value for value in values if math.isfinite(value)])
    if means.size:
        assert means.min() >= finite.min() - 1e-6 * abs(finite.min())
        assert means.max() <= finite.max() + 1e-6 * abs(finite.max())
    else:
        assert not finite.size


def test_line_goes_through_its_points() -> None:
    svg = line_chart(
        [Series("a", [0, 0.5, 1], [0, 1, 0.5])], title="t", x_label="x", y_label="y", x_range=(0, 1), y_range=(0, 1)
    )
    ((first, second, third),) = points(svg)
    assert second[0] == pytest.approx((first[0] + third[0]) / 2, abs=0.06)
    assert first[1] - third[1] == pytest.approx((first[1] - second[1]) / 2, abs=0.11)
    assert {"x", "y", "0", "1"} <= set(texts(svg))


def test_long_curve_is_thinned_without_losing_its_steep_part() -> None:
    x = np.linspace(0, 1, 200_000)
    y = 1 - np.exp(-x * 1000)  # nearly all of the rise within a hundredth of the axis
    (line,) = points(
        line_chart([Series("roc", x, y)], title="t", x_label="x", y_label="y", x_range=(0, 1), y_range=(0, 1))
    )
    assert len(line) <= 401
    heights = np.array([point[1] for point in line])
    assert np.abs(np.diff(heights)).max() < 5, "pixels between neighbours"
    assert line[-1][0] == pytest.approx(542, abs=0.1)


def test_log_axis_leaves_out_what_it_cannot_show_and_spaces_decades_evenly() -> None:
    svg = line_chart([Series("T", [0, 1e-4, 1e-2, 1], [9, 4, 2, 1])], title="t", x_label="x", y_label="y", x_log=True)
    (line,) = points(svg)
    assert len(line) == 3
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)
    assert "0.01" in texts(svg)


def test_several_lines_get_a_legend() -> None:
    both = [Series("fp32", [0, 1], [1, 2]), Series("fp16", [0, 1], [1, 3])]
    assert {"fp32", "fp16"} <= set(texts(line_chart(both, title="t", x_label="x", y_label="y")))
    assert "fp32" not in texts(line_chart(both[:1], title="t", x_label="x", y_label="y"))


@given(st.lists(st.tuples(anything, anything), max_size=30), st.booleans(), st.booleans())
def test_any_numbers_give_a_chart_or_nothing(pairs: list[tuple[float, float]], x_log: bool, y_log: bool) -> None:
    x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    svg = line_chart([Series("a", x, y)], title="t", x_label="x", y_label="y", x_log=x_log, y_log=y_log)
    drawable = [
        (a, b)
        for a, b in pairs
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not x_log) and (b > 0 or not y_log)
    ]
    assert bool(svg) == bool(drawable)
    if svg:
        parse(svg)
        assert "nan" not in svg
        assert "inf" not in svg


def test_histogram_counts_every_value_and_those_above() -> None:
    rng = np.random.default_rng(0)
    good, defective = rng.normal(1, 0.1, 40), np.append(rng.normal(3, 0.1, 25), np.nan)
    svg = histogram([("good", good), ("none", []), ("defective", defective)], title="t", x_label="score", threshold=2.0)
    shown = texts(svg)
    assert "good: 40, 0 above T" in shown
    assert "defective: 26, 25 above T, 1 not finite" in shown
    assert not any(text.startswith("none") for text in shown)
    assert "T 2" in shown
    bars = [int(bar.find("title").text.rsplit(": ")[1]) for bar in parse(svg).iter("rect")]
    assert sum(bars) == 65
    mark = next(line for line in parse(svg).iter("line") if line.attrib["class"] == "mark")
    edges = [(float(bar.attrib["x"]), bar.attrib["class"]) for bar in parse(svg).iter("rect")]
    assert all((x < float(mark.attrib["x1"])) == (css == "bar s1") for x, css in edges)


@given(st.lists(anything, max_size=30), st.one_of(st.none(), anything))
def test_any_scores_give_a_histogram_or_nothing(values: list[float], threshold: float | None) -> None:
    svg = histogram([("a", values)], title="t", x_label="x", threshold=threshold)
    assert bool(svg) == any(map(math.isfinite, values))
    if svg:
        counts = [int(bar.find("title").text.rsplit(": ")[1]) for bar in parse(svg).iter("rect")]
        assert sum(counts) == sum(map(math.isfinite, values))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart(
        [("a", 100.0, 120.0, "x"), ("b", 25.0, 30.0, "y"), ("c", math.nan, 1.0, "z")], title="t", x_label="ms"
    )
    widths = [float(bar.attrib["width"]) for bar in parse(svg).iter("rect")]
    assert len(widths) == 2
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-3)
    assert bar_chart([], title="t", x_label="ms") == ""


@given(st.text())
def test_labels_survive_as_text(label: str) -> None:
    svg = histogram([(label, [1.0])], title=label, x_label=label, threshold=None)
    assert f"{plain_text(label)}: 1" in texts(svg)


@given(st.text(st.characters(), max_size=50))
def test_plain_text_is_utf8_without_control_characters(text: str) -> None:
    shown = plain_text(text)
    shown.encode("utf-8")
    assert not any(letter < " " or "\x7f" <= letter <= "\x9f" for letter in shown)
    if text.isprintable():
        assert shown == text
