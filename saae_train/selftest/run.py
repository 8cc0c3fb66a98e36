"""Counts how many simulated defects a model finds, by kind, size and contrast: an estimate without defect images.

Simulated defects are drawn onto held-out normal images (simulate.py), scored, and counted: found when the image score
is above the image threshold, marked when the map is above T somewhere inside the true mask. A model that misses large,
strong ones is blind, and `require_detection` refuses it. One that finds them all may still miss real defects.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saae_runtime.errors import ConfigError, DataError, SelfTestError, SimulationError
from saae_runtime.geometry import upsample_map
from saae_runtime.progress import Progress, silent
from saae_runtime.result import Scored, Scorer

from ..charts.sheet import SheetColumn
from ..data.category import GOOD, Sample
from ..data.split import spread
from ..evaluation.metrics import pool_metrics
from ..evaluation.pixel_pool import PixelPool
from ..evaluation.share import Share
from .result import LEAST_FOUND, LEAST_JUDGED, Defect, Recipe, SelfTest
from .simulate import CONTRASTS, KINDS, SIZES, Simulated, simulate

__all__ = ["DEFAULT_FRAMES", "check_request", "draw_examples", "require_detection", "selftest"]

DEFAULT_FRAMES = 60
_EASY_SHARE = 0.2  # share of the frames that are planned large and strong, for the verdict
_LOUD = ("scratch", "texture", "spot")  # kinds that reach any contrast on any product
_SIMULATED = "simulated"


def selftest(
    scorer: Scorer,
    samples: Sequence[Sample],
    *,
    threshold: float,
    image_threshold: float,
    kinds: Sequence[str] = KINDS,
    frames: int = DEFAULT_FRAMES,
    seed: int = 0,
    synthetic: bool = False,
    progress: Progress = silent,
) -> SelfTest:
    """Draw defects onto held-out normal images and count what a scorer finds.

    Two scorers given the same samples, kinds, frames and seed see the same images, so their results can be compared
    one by one.

    Args:
        scorer: scores one frame.
        samples: normal images that the model was not fitted on, at least one.
        threshold: pixel T.
        image_threshold: image T.
        kinds: of `saae_train.selftest.simulate.KINDS`.
        frames: images with a defect; up to half as many untouched ones are scored beside them.
        seed: decides places, shapes and colours.
        synthetic: whether the samples themselves were drawn; said in the result.
        progress: called with (done, total) frames.

    Raises:
        DataError: no samples, or a score that is not finite.
        SimulationError: images too small to draw on, or nothing could be drawn that can be seen.
        ConfigError: no frames, or an unknown kind.
    """
    chosen = tuple(samples)
    if not chosen:
        raise DataError(
            "The self-test has no image to draw on.",
            "It takes normal images that the model was not fitted on.",
            "add normal images, or leave the self-test out",
        )
    plan = _plan(frames, kinds, seed)
    read = lru_cache(maxsize=8)(lambda index: chosen[index].read())
    untouched = spread(range(len(chosen)), max(1, frames // 2))
    total = len(plan) + len(untouched)
    pool = PixelPool()
    alarms = 0
    for done, index in enumerate(untouched):
        progress(done, total)
        name = str(chosen[index].path)
        found = _score(scorer, read(index), name)
        alarms += found.score > image_threshold
        pool.add(found.anomaly_map, None, GOOD, name)
    defects: list[Defect] = []
    not_drawn: dict[str, int] = {}
    for number, recipe in enumerate(_recipes(plan, len(chosen), seed)):
        progress(len(untouched) + number, total)
        drawn = _draw(read, recipe)
        if drawn is None:
            not_drawn[recipe[2]] = not_drawn.get(recipe[2], 0) + 1
            continue
        name = str(chosen[recipe[0]].path)
        found = _score(scorer, drawn.frame, name)
        pool.add(found.anomaly_map, drawn.mask, _SIMULATED, name)
        defects.append(_judge(drawn, found, name, recipe, threshold, image_threshold))
    progress(total, total)
    if not defects:
        raise SimulationError(
            "No simulated defect could be made visible.",
            f"{len(plan)} were tried: {', '.join(dict.fromkeys(kinds))}.",
            "give images with visible structure, or all kinds",
        )
    metrics = pool_metrics(pool)
    return SelfTest(
        defects=tuple(defects),
        false_alarms=Share(alarms, len(untouched)),
        threshold=threshold,
        image_threshold=image_threshold,
        pixel_roc_auc=metrics["pixel_roc_auc"],
        pro_auc=metrics["pro_auc"],
        not_drawn=not_drawn,
        images=len({d.file for d in defects}),
        seed=seed,
        synthetic=synthetic,
    )


def _recipes(plan: Sequence[tuple[str, str, str]], images: int, seed: int) -> Iterator[Recipe]:
    """What to draw onto which image. A few defects are spread over all images."""
    for number, wanted in enumerate(plan):
        index = number % images if len(plan) >= images else number * images // len(plan)
        yield (index, (index + 1) % images, *wanted, seed * 1_000_003 + number)


def require_detection(result: SelfTest, cure: str) -> None:
    """The gate of a build.

    Raises:
        SelfTestError: the model misses too many of the large, strong simulated defects.
    """
    if not result.misses_easy:
        return
    missed = sorted({d.kind for d in result.defects if d.easy and not d.found})
    raise SelfTestError(
        f"The model is blind: it finds {result.easy} large, strong simulated defects.",
        f"At least {LEAST_FOUND:.0%} must score above the image threshold of {result.image_threshold:.4g}; "
        f"it misses {', '.join(missed) or 'none'}, and calls {result.false_alarms} untouched images defective.",
        cure,
    )


def draw_examples(
    scorer: Scorer, samples: Sequence[Sample], result: SelfTest, per_kind: int = 2
) -> list[tuple[Defect, SheetColumn]]:
    """Examples of each kind: the easiest miss, then found ones with a middle score; drawn and scored again.

    Args:
        scorer, samples: those that `result` came from.
        per_kind: images of each kind.
    """
    chosen: list[Defect] = []
    for kind in result.kinds:
        missed = sorted(
            (d for d in result.defects if d.kind == kind and not d.found), key=lambda d: -d.change * math.sqrt(d.area)
        )
        found = sorted((d for d in result.defects if d.kind == kind and d.found), key=lambda d: d.score)
        picked = missed[:1]
        start = max(0, (len(found) - (per_kind - len(picked))) // 2)
        picked += found[start : start + per_kind - len(picked)]
        chosen += picked + missed[1 : 1 + per_kind - len(picked)]
    read = lru_cache(maxsize=8)(lambda index: samples[index].read())
    columns = []
    for defect in chosen:
        drawn = _draw(read, defect.recipe)
        assert drawn is not None  # it was drawn before
        anomaly_map = scorer(drawn.frame).anomaly_map
        title = f"{defect.kind}, {defect.size}, {defect.contrast}: {'found' if defect.found else 'MISSED'}"
        columns.append(
            (defect, SheetColumn(title, drawn.frame, drawn.mask, upsample_map(anomaly_map, drawn.frame.shape[:2])))
        )
    return columns


def check_request(frames: int, kinds: Sequence[str]) -> None:
    """Check a request for a self-test before any slow work.

    Raises:
        ConfigError: no frames, no kinds, or an unknown kind.
    """
    if frames < 1:
        raise ConfigError(f"A self-test needs at least one frame, not {frames}.", "", "--frames 60")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(
            f"There is no kind of simulated defect {', '.join(map(repr, unknown))}."
            if unknown
            else "No kind of simulated defect was given.",
            f"There are: {', '.join(KINDS)}.",
            "name some of these, or leave it out for all",
        )


def _plan(frames: int, kinds: Sequence[str], seed: int) -> list[tuple[str, str, str]]:
    """What to draw: a fixed share large and strong, the rest all combinations in turn, shuffled by the seed."""
    check_request(frames, kinds)
    rng = np.random.default_rng([seed, 20])
    easy = [(kind, "large", "strong") for kind in kinds if kind in _LOUD]
    number = min(frames, max(LEAST_JUDGED, math.ceil(_EASY_SHARE * frames))) if easy else 0
    first = [easy[i % len(easy)] for i in range(number)]
    every = list(itertools.product(dict.fromkeys(kinds), SIZES, CONTRASTS))
    rest = [every[i] for i in rng.permutation(len(every))]
    planned = first + list(itertools.islice(itertools.cycle(rest), frames - number))
    return [planned[i] for i in rng.permutation(len(planned))]


def _draw(read: Callable[[int], NDArray[np.uint8]], recipe: Recipe) -> Simulated | None:
    index, donor, kind, size, contrast, seed = recipe
    return simulate(read(index), kind, size, contrast, seed=seed, donor=None if donor == index else read(donor))


def _score(scorer: Scorer, frame: NDArray[np.uint8], name: str) -> Scored:
    """Score and map at the frame's size."""
    found = scorer(frame)
    if not np.isfinite(found.score):
        raise DataError(
            f"{name}: the score is {found.score}.",
            "A score that is not finite cannot be compared with a threshold.",
            "look for NaN weights or an FP16 overflow in the model",
        )
    return Scored(found.score, upsample_map(found.anomaly_map, frame.shape[:2]))


def _judge(
    drawn: Simulated, found: Scored, name: str, recipe: Recipe, threshold: float, image_threshold: float
) -> Defect:
    peak = float(found.anomaly_map[drawn.mask].max())
    return Defect(
        file=name,
        kind=recipe[2],
        size=drawn.size,
        contrast=drawn.strength,
        extent=round(drawn.extent, 1),
        area=drawn.area,
        change=round(drawn.contrast, 2),
        score=found.score,
        peak=peak,
        found=found.score > image_threshold,
        marked=peak > threshold,
        recipe=recipe,
    )
