"""The committed figures are those that the code draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from doc_checks import ROOT

pytestmark = pytest.mark.needs("torch")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_and_rest(svg: str) -> tuple[list[float], str]:
    """The numbers of an SVG, and its text without them."""
    pattern = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return [float(number) for number in re.findall(pattern, svg)], re.sub(pattern, "#", svg)


def test_the_committed_figures_are_what_is_drawn(figures: ModuleType, tmp_path: Path) -> None:
    figures.main(tmp_path)
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/figures").glob("*.svg")}
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert set(committed) == set(drawn)
    for name, text in drawn.items():
        found, rest = numbers_and_rest(text)
        expected, words = numbers_and_rest(committed[name])
        assert rest == words, name
        assert found == pytest.approx(expected, abs=0.11), (
            f"{name}: run python docs/figures.py"
        )  # the last digit may differ


def test_every_figure_is_a_small_drawing_that_loads_nothing_and_a_page_shows_it(figures: ModuleType) -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    for name, draw in figures.FIGURES.items():
        text = draw()
        assert len(text) < 10_000
        assert "href" not in text
        assert "url(" not in text
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert f"](figures/{name}.svg)" in page
