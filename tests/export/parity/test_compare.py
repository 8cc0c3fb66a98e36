"""The parity gate on numbers whose errors are known."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saae_export.parity.compare import BOUNDS, Bounds, ParityReport, compare, parity_table, require
from saae_runtime.errors import ConfigError, ParityError
from saae_runtime.result import Scored

MAP = np.linspace(0.1, 1.0, 12 * 10, dtype=np.float32).reshape(12, 10)
FRAME = np.zeros((12, 10, 3), np.uint8)


def _report(
    found: np.ndarray, score: float = 0.5, precision: str = "fp16", bounds: Bounds | None = None, t: float = 0.5
):
    return compare(
        lambda frame: Scored(0.5, MAP),
        lambda frame: Scored(score, found),
        [("a.png", FRAME)],
        threshold=t,
        image_threshold=0.45,
        artefact="model.onnx",
        precision=precision,
        bounds=bounds,
    )


def test_equal_outputs_pass() -> None:
    report = _report(MAP)
    assert report.passed
    assert report.map_error == 0
    assert report.flips == 0
    require([report])


def test_the_map_error_is_relative_to_the_largest_value_and_names_its_pixel() -> None:
    found = MAP.copy()
    found[7, 3] += 0.02
    report = _report(found)
    assert report.map_error == pytest.approx(0.02, rel=1e-3)
    assert report.worst.worst_pixel == (7, 3)
    assert report.worst.found == pytest.approx(float(MAP[7, 3]) + 0.02, rel=1e-6)


def test_a_map_beyond_its_bound_fails_with_image_and_place() -> None:
    found = MAP.copy()
    found[11, 9] += 0.1
    with pytest.raises(ParityError, match=r"a\.png, pixel \(11, 9\)") as caught:
        require([_report(found)])
    assert caught.value.exit_code == 3
    assert "model.onnx" in caught.value.what


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(bad: float) -> None:
    found = MAP.copy()
    found[0, 0] = bad
    assert not _report(found).passed
    assert not _report(MAP, score=bad).passed
    # The manifest is JSON, which has no infinity.
    assert np.isfinite(_report(found).summary().map_rel_error)


def test_a_score_beyond_its_bound_fails() -> None:
    assert _report(MAP, score=0.5 * (1 + 0.9 * BOUNDS["fp16"].score)).passed
    assert not _report(MAP, score=0.5 * (1 + 1.1 * BOUNDS["fp16"].score)).passed


def test_decisions_flip_outside_the_dead_band_only() -> None:
    pixel = (6, 6)
    t = float(MAP[pixel])
    bounds = Bounds(map=1.0, score=1.0, dead_band=0.01)
    found = MAP.copy()
    found[pixel] = t * 1.005
    assert _report(found, bounds=bounds, t=t * 1.001).flips == 0, "the reference lies inside the band"
    found[pixel] = t * 1.05
    report = _report(found, bounds=bounds, t=t * 1.02)
    assert report.images[0].pixel_flips == 1
    assert not report.passed


def test_an_image_that_flips_fails_even_within_the_error_bounds() -> None:
    bounds = Bounds(map=1.0, score=1.0, dead_band=0.01)
    report = _report(MAP, score=0.4, bounds=bounds)
    assert report.images[0].image_flip
    assert report.flips == 1
    assert not report.passed


def test_bounds_widen_with_the_precision() -> None:
    found = MAP * np.float32(1.01)
    assert not _report(found, score=0.5, precision="fp32").passed
    assert _report(found, score=0.5, precision="fp16").map_error < BOUNDS["fp16"].map


def test_worst_image_is_the_one_furthest_out() -> None:
    maps = {"a": MAP, "b": MAP + np.float32(0.01), "c": MAP + np.float32(0.005)}
    names = list(maps)
    frames = [(name, np.full_like(FRAME, index)) for index, name in enumerate(names)]
    report = compare(
        lambda frame: Scored(0.5, MAP),
        lambda frame: Scored(0.5, maps[names[int(frame[0, 0, 0])]]),
        frames,
        threshold=5.0,
        image_threshold=5.0,
        artefact="model.onnx",
        precision="fp16",
    )
    assert report.worst.name == "b"
    summary = report.summary()
    assert (summary.images, summary.worst_image, summary.passed) == (3, "b", True)


def _in_batches(answer: Callable[[int, int], float], count: int = 3, repeats: int = 3) -> ParityReport:
    """A report on frames in batches of 1, 2 and 5; `answer`: factor of the map for (batch, which call of it)."""
    calls: Counter[int] = Counter()

    def candidate(given: Any) -> Any:
        size = len(given) if isinstance(given, list) else 1
        calls[size] += 1
        found = Scored(0.5, MAP * np.float32(answer(size, calls[size])))
        return [found] * size if isinstance(given, list) else found

    report = compare(
        lambda frame: Scored(0.5, MAP),
        candidate,
        [(f"{number}.png", FRAME) for number in range(count)],
        threshold=5.0,
        image_threshold=5.0,
        artefact="some.engine",
        precision="fp32",
        batches={1, 2, 5},
        repeats=repeats,
    )
    assert {size: number // repeats for size, number in calls.items()} == {1: 3, 2: 2, 5: 1}
    return report


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_is_wrong_in_one_batch_size_is_named_with_it(size: int) -> None:
    report = _in_batches(lambda batch, _: 1.5 if batch == size else 1.0, repeats=1)
    assert not report.passed
    assert [row.batch for row in report.images] == [size] * 3  # each with its worst answer
    with pytest.raises(ParityError, match="disagrees with PyTorch") as caught:
        require([report])
    assert (f"in a batch of {size}" in caught.value.why) == (size > 1)
    assert (f"in a batch of {size}" in report.summary().worst_image) == (size > 1)


def test_repeats_have_to_be_equal_to_the_bit() -> None:
    assert _in_batches(lambda batch, call: 1.0 + 1e-6).passed
    report = _in_batches(lambda batch, call: 1.0 + (1e-6 if (batch, call) == (5, 3) else 0.0))
    assert report.map_error < BOUNDS["fp32"].map
    assert not report.passed
    assert not report.summary().passed
    with pytest.raises(ParityError, match=r"a different map each time: 0\.png in a batch of 5"):
        require([report])


def test_no_images_and_other_shapes_are_errors() -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        compare(
            lambda f: Scored(0.5, MAP),
            lambda f: Scored(0.5, MAP),
            [],
            threshold=1,
            image_threshold=1,
            artefact="x",
            precision="fp32",
        )
    with pytest.raises(ConfigError, match="different shapes"):
        _report(MAP[:5])


def test_the_table_shows_failures() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(parity_table([_report(MAP), _report(MAP * np.float32(2))]))
    text = console.export_text()
    assert "pass" in text
    assert "FAIL" in text


def test_a_few_pixels_may_jump_where_the_bounds_allow_a_share() -> None:
    """A patch between two entries of a memory lies on either side of T; an image's decision may not."""
    size = (100, 200)
    reference = np.full(size, 0.1, np.float32)
    bounds = Bounds(map=1.0, score=1.0, dead_band=1e-2, pixels=1e-3)

    def report(pixels: int, score: float = 0.1) -> ParityReport:
        found = reference.copy()
        found.flat[:pixels] = 0.9
        return compare(
            lambda frame: Scored(0.1, reference),
            lambda frame: Scored(score, found),
            [("a.png", np.zeros((*size, 3), np.uint8))],
            threshold=0.5,
            image_threshold=0.15,
            artefact="model.onnx",
            precision="fp16",
            bounds=dataclasses.replace(bounds, map=100.0),
        )

    assert report(20).passed
    assert report(20).images[0].pixel_flips == 20
    assert not report(21).passed
    assert report(21).flips == 1
    assert not report(0, score=0.19).passed
