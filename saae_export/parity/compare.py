"""The parity gate: compares a deployed artefact with its reference on real images: maps, scores and decisions.

Bounds are relative. The map error of an image is max |A - A_ref| over its pixels divided by max |A_ref|; the score
error is |s - s_ref| / |s_ref|. A decision flips if the two values lie on different sides of a threshold and the
reference lies outside a dead band around it (a share of the threshold), in which the order of summation decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from saae_runtime.errors import ConfigError, ParityError
from saae_runtime.manifest import IN_BF16, Manifest, Parity
from saae_runtime.result import Scored, Scorer

from ..artefacts import stores_half

__all__ = [
    "BOUNDS",
    "HALF_WEIGHTS",
    "Bounds",
    "ImageParity",
    "MEMORY_FP16",
    "ParityReport",
    "bounds_of",
    "compare",
    "parity_table",
    "require",
]


@dataclass(frozen=True)
class Bounds:
    """Bounds of a precision, all relative.

    Attributes:
        map, score: largest errors of map and score.
        dead_band: band around a threshold within which decisions may differ.
        pixels: share of an image's pixels that may lie on different sides of T outside the dead band.
    """

    map: float
    score: float
    dead_band: float
    pixels: float = 0.0


BOUNDS = {
    "fp32": Bounds(map=1e-3, score=1e-3, dead_band=2e-4),
    "fp16": Bounds(map=2e-2, score=1e-2, dead_band=1e-2),
    "bf16": Bounds(map=6e-2, score=4e-2, dead_band=3e-2),
    "int8": Bounds(map=3e-1, score=2e-1, dead_band=3e-1),
    "int8-bf16": Bounds(map=3e-1, score=2e-1, dead_band=3e-1),
}
"""Bounds per precision. FP32 allows for reordered sums; FP16 has 11 bits and bf16 8, with errors of 30 layers.
INT8 has its own gate, on quality (pipeline/quality.py), which bf16 has to pass, too: rounding raises the whole map, and
thresholds with it."""

HALF_WEIGHTS = Bounds(map=5e-3, score=5e-3, dead_band=2e-3)
"""Bounds of an FP32 graph whose weights are stored in FP16: only the weights are rounded."""


_JUMPS = 1e-4

MEMORY_FP32 = Bounds(map=1e-2, score=2e-3, dead_band=2e-4, pixels=_JUMPS)
"""Bounds of an FP32 graph with a memory. Which entries are the nearest, and their weights, follow from small
differences of distances. Where the order of summation changes them, the map jumps over the pixels of the patch."""

MEMORY_FP16 = Bounds(map=6e-2, score=2e-2, dead_band=2e-2, pixels=_JUMPS)
"""Bounds of an FP16 graph with a memory: where normal patches lie close together (uniform regions), FP16 features
change the weights of the nearest entries, and more patches jump. Measured on 46 cookies: map 0.046, score 0.008."""

MEMORY_BF16 = Bounds(map=1.5e-1, score=6e-2, dead_band=3e-2, pixels=_JUMPS)
"""Bounds in bf16 of a graph with a memory: rounding increases the distance of a patch to its neighbours, small ones
most. Most of the increase is the same everywhere, and in the thresholds of this precision, too. Measured on AMX units:
map 0.088."""

_MEMORY = {"fp32": MEMORY_FP32, "fp16": MEMORY_FP16, "bf16": MEMORY_BF16}


@dataclass(frozen=True)
class ImageParity:
    """One image's agreement.

    Attributes:
        name: file name.
        map_error, score_error: relative, see the module's docstring.
        pixel_flips: pixels outside the dead band on different sides of T.
        pixels_allowed: how many of them are within the bounds.
        image_flip: the image's decision differs, outside the dead band.
        worst_pixel: (row, column) of the largest map difference.
        reference, found: the two values there.
        batch: how many images were computed together.
        steady: whether repeats gave the same map and score.
    """

    name: str
    map_error: float
    score_error: float
    pixel_flips: int
    image_flip: bool
    worst_pixel: tuple[int, int]
    reference: float
    found: float
    batch: int = 1
    steady: bool = True
    pixels_allowed: int = 0

    @property
    def flips(self) -> bool:
        return self.image_flip or self.pixel_flips > self.pixels_allowed

    @property
    def words(self) -> str:
        """The image's name, and its batch size if above 1."""
        return self.name if self.batch == 1 else f"{self.name} in a batch of {self.batch}"


@dataclass(frozen=True)
class ParityReport:
    """Agreement of one artefact over all images; `passed` is the gate."""

    artefact: str
    precision: str
    against: str
    bounds: Bounds
    images: tuple[ImageParity, ...]

    @property
    def worst(self) -> ImageParity:
        """The image furthest from its bounds; unequal repeats count most, then a flip."""
        return max(self.images, key=lambda row: _badness(row, self.bounds))

    @property
    def map_error(self) -> float:
        return max(row.map_error for row in self.images)

    @property
    def score_error(self) -> float:
        return max(row.score_error for row in self.images)

    @property
    def flips(self) -> int:
        """Images whose decision at T differs (the image's own, or any pixel's), outside the dead band."""
        return sum(row.flips for row in self.images)

    @property
    def steady(self) -> bool:
        """Whether repeats of the same images gave the same results."""
        return all(row.steady for row in self.images)

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        within = self.map_error <= self.bounds.map and self.score_error <= self.bounds.score
        return within and self.flips == 0 and self.steady

    def summary(self) -> Parity:
        """As an entry of the manifest."""
        return Parity(
            images=len(self.images),
            map_rel_error=_finite(self.map_error),
            score_rel_error=_finite(self.score_error),
            flips=self.flips,
            bound_map=self.bounds.map,
            bound_score=self.bounds.score,
            passed=self.passed,
            worst_image=self.worst.words,
            reference=self.against,
        )


def compare(
    reference: Scorer,
    candidate: Callable[[Any], Any],
    frames: Iterable[tuple[str, NDArray[np.uint8]]],
    *,
    threshold: float,
    image_threshold: float,
    artefact: str,
    precision: str,
    against: str = "PyTorch FP32",
    bounds: Bounds | None = None,
    batches: Collection[int] = (1,),
    repeats: int = 1,
) -> ParityReport:
    """Compare two scorers frame by frame, and in batches.

    Args:
        reference: the side that counts as correct.
        candidate: the artefact under test; for batches it takes a list of frames, as an Engine does.
        frames: (name, uint8 H x W x 3) pairs.
        threshold: pixel T at which decisions are compared.
        image_threshold: the image's.
        artefact: its file name, for the report.
        precision: fp32, fp16, bf16, int8 or int8-bf16; chooses the bounds.
        against: description of the reference.
        bounds: None: the precision's.
        batches: batch sizes; every frame is compared in each of them. A batch is filled up with repeated frames if
            there are too few.
        repeats: how often each batch is computed.

    Raises:
        ConfigError: no frames, or maps of different shapes.
    """
    limits = bounds or BOUNDS[precision]
    rows = []
    for part in _parts(frames, max(batches)):
        expected = [reference(frame) for _, frame in part]
        answers: list[list[ImageParity]] = [[] for _ in part]
        for places, found, steady in _answers(candidate, [frame for _, frame in part], batches, repeats):
            for place, scored, same in zip(places, found, steady, strict=True):
                name, wanted = part[place][0], expected[place]
                if scored.anomaly_map.shape != wanted.anomaly_map.shape:
                    raise _other_shape(name, wanted, scored)
                row = _compare_one(name, wanted, scored, threshold, image_threshold, limits)
                answers[place].append(dataclasses.replace(row, batch=len(places), steady=same))
        rows += [max(found, key=lambda row: _badness(row, limits)) for found in answers]
    if not rows:
        raise ConfigError("Parity needs at least one image.", "None were given.", "give images: --data FOLDER")
    return ParityReport(artefact, precision, against, limits, tuple(rows))


def _parts(frames: Iterable[tuple[str, NDArray[np.uint8]]], size: int) -> Iterator[list[tuple[str, NDArray[np.uint8]]]]:
    left = iter(frames)
    while part := list(islice(left, size)):
        yield part


def _answers(
    candidate: Callable[[Any], Any], frames: Sequence[NDArray[np.uint8]], batches: Collection[int], repeats: int
) -> Iterator[tuple[list[int], Sequence[Scored], list[bool]]]:
    """For each batch of each size: (which frames, the first results, whether repeats were equal)."""
    for size in sorted(batches):
        for start in range(0, len(frames), size):
            places = [(start + place) % len(frames) for place in range(size)]
            together = [frames[place] for place in places]
            runs = [[candidate(together[0])] if size == 1 else candidate(together) for _ in range(repeats)]
            steady = [all(_equal(first, other) for other in others) for first, *others in zip(*runs, strict=True)]
            yield places, runs[0], steady


def _equal(one: Scored, other: Scored) -> bool:
    return one.score == other.score and np.array_equal(one.anomaly_map, other.anomaly_map)


def _other_shape(name: str, expected: Scored, found: Scored) -> ConfigError:
    return ConfigError(
        f"{name}: the maps have different shapes, {expected.anomaly_map.shape} and {found.anomaly_map.shape}.",
        "The two sides were built for different geometries.",
        "rebuild the bundle: saae-export build",
    )


def bounds_of(manifest: Manifest, precision: str) -> Bounds:
    """The bounds for a bundle's artefacts of a precision, engines compiled from its graph included."""
    half = precision == "fp32" and any(stores_half(item) for item in manifest.artefacts if item.precision == precision)
    if manifest.model.score == "memory" and precision in _MEMORY:
        return _MEMORY["fp16" if half else precision]
    return HALF_WEIGHTS if half else BOUNDS[precision]


def require(reports: Iterable[ParityReport], cure: str = "") -> None:
    """The gate.

    Raises:
        ParityError: a report is outside its bounds; the message names artefact, image and place.
    """
    failed = [report for report in reports if not report.passed]
    if not failed:
        return
    report = failed[0]
    worst = report.worst
    row, column = worst.worst_pixel
    if not report.steady:
        raise ParityError(
            f"Parity failed: {report.artefact} gives a different map each time: {worst.words}.",
            "Repeated runs of the same images are not equal.",
            cure or "use another precision, or a newer release of the library",
        )
    raise ParityError(
        f"Parity failed: {', '.join(item.artefact for item in failed)} disagrees with {report.against}.",
        f"worst image {worst.words}, pixel ({row}, {column}): {worst.found:.6g} instead of {worst.reference:.6g}; "
        f"map error {report.map_error:.2g} (bound {report.bounds.map:.2g}), "
        f"score error {report.score_error:.2g} (bound {report.bounds.score:.2g}), "
        f"{report.flips} of {len(report.images)} images decided differently",
        cure or "rebuild with --precision fp32, or look at the first node that diverges: saae-export verify --diagnose",
    )


def parity_table(reports: Iterable[ParityReport]) -> Table:
    """The reports as a table for the terminal."""
    table = Table(title="Parity: errors relative, in brackets the bounds", title_justify="left")
    table.add_column("artefact", overflow="fold")
    table.add_column("map error")
    table.add_column("score error")
    table.add_column("flips", justify="right")
    table.add_column("worst image, pixel", overflow="fold")
    table.add_column("")
    against = []
    for report in reports:
        worst, bounds = report.worst, report.bounds
        table.add_row(
            escape(report.artefact if report.precision not in IN_BF16 else f"{report.artefact}, in bf16"),
            _measured(report.map_error, bounds.map),
            _measured(report.score_error, bounds.score),
            str(report.flips) if not report.flips else f"[red]{report.flips}[/red]",
            escape(f"{worst.words} {worst.worst_pixel[0]},{worst.worst_pixel[1]}"),
            _verdict(report),
        )
        against.append(f"{len(report.images)} images, against {report.against}")
    table.caption = escape("; ".join(dict.fromkeys(against))) or None
    table.caption_justify = "left"
    return table


def _verdict(report: ParityReport) -> str:
    if report.passed:
        return "[green]pass[/green]"
    return "[bold red]FAIL[/bold red]" + ("" if report.steady else ": a different map each time")


def _measured(value: float, bound: float) -> str:
    text = f"{value:.0e} ({bound:.0e})"
    return text if value <= bound else f"[red]{text}[/red]"


def _compare_one(
    name: str, reference: Scored, found: Scored, threshold: float, image_threshold: float, bounds: Bounds
) -> ImageParity:
    a, b = reference.anomaly_map.astype(np.float64), found.anomaly_map.astype(np.float64)
    difference = np.abs(a - b)
    difference[~np.isfinite(b)] = np.inf
    row, column = (int(x) for x in np.unravel_index(int(np.argmax(difference)), difference.shape))
    clear = np.abs(a - threshold) > bounds.dead_band * abs(threshold)
    flipped = ((a > threshold) != (b > threshold)) & clear
    image_clear = abs(reference.score - image_threshold) > bounds.dead_band * abs(image_threshold)
    image_flip = image_clear and (reference.score > image_threshold) != (found.score > image_threshold)
    return ImageParity(
        name=name,
        map_error=float(difference[row, column]) / max(float(np.abs(a).max()), _TINY),
        score_error=_relative(reference.score, found.score),
        pixel_flips=int(np.count_nonzero(flipped)),
        image_flip=bool(image_flip),
        worst_pixel=(row, column),
        reference=float(a[row, column]),
        found=float(b[row, column]),
        pixels_allowed=int(bounds.pixels * a.size),
    )


_TINY = 1e-12


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), _TINY) if math.isfinite(b) else math.inf


def _badness(row: ImageParity, bounds: Bounds) -> tuple[bool, bool, float]:
    return not row.steady, row.flips, max(row.map_error / bounds.map, row.score_error / bounds.score)


def _finite(value: float) -> float:
    """The number, or the largest float32 for infinity, which JSON lacks."""
    return value if math.isfinite(value) else float(np.finfo(np.float32).max)
