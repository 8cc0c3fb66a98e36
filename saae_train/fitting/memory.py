"""Builds the memory of normal patches, and scores every fitted image against the patches of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saae_runtime.errors import FitError
from saae_runtime.geometry import gaussian_matrix
from saae_runtime.progress import Progress, labelled, silent

from ..config import FitConfig
from ..data.bursts import sequence_reach
from ..data.category import Sample, distinct_names
from ..data.split import content_hashes
from ..model.detector import FeatureSpace, Projected, anomaly_score, memory_score
from ..model.left_out import LeftOut
from ..model.memory import CANDIDATES, SEARCH, Memory, Nearest, compare
from ..model.saae import SAAE
from .features import FeatureSet
from .loop import Reporter

__all__ = ["balance", "build_memory", "level_exponent", "remember"]

_POOL = 440_000
"""Largest number of patches that entries are chosen from, spread over all images."""

_FEW = 4096
"""Number of entries up to which every patch may become one."""

_SPARED = 3
"""Fewest patches per entry, beyond `_FEW` entries."""

_SKETCH = 64
"""Width of the random projection for choosing entries; it preserves distances (Johnson-Lindenstrauss)."""

_POOLED = 4
"""Neighbouring entries whose patches also count for an entry's radius."""

_PRIOR = 3
"""Patches at the mean distance that every radius starts from."""

_SHARE = 0.75
"""Spread of normal patches that the autoencoder's factor of the score adds, in units of the memory's own."""

_LEVEL_SHARE, _MOST_LEVEL = 1 / 3, 0.2
"""Of the slope of the largest score on the image's level, the share that becomes beta, and the largest beta. A large
defect raises the level, too: the whole slope would hide it."""

_TOGETHER = 8
"""Entries chosen in one pass over the pool."""

_WEIGHT_POWER = -0.25
"""Components are weighted by their variance to this power, so that the few largest do not dominate the distance."""

Rows = Callable[[int], Tensor]
"""Number of an image -> its patches g, float32 L x k."""


def build_memory(
    rows: Rows,
    images: int,
    entries: int,
    seed: int,
    reach: int = 0,
    search: int | None = None,
    progress: Progress = silent,
) -> tuple[Memory, Nearest]:
    """Choose entries that cover the patches of all images, and measure how far normal patches lie from them.

    Entries by greedy k-centre on a random projection (PatchCore, Roth et al. 2022, algorithm 1). The radius of an
    entry is the root mean square of d over the normal patches that are nearest to it or to one of its neighbours,
    each patch with the entries of its own image left out: what d is for a normal image that is not in the memory.

    Args:
        rows: patches of an image, in the SAAE's space.
        images: how many.
        entries: number of entries; a third of the patches or 4096 where that is fewer.
        seed: of the choice.
        reach: images this near in the order are near-copies (`saae_train.data.bursts`) and are left out together.
        search: components that the memory chooses candidates by, see `Memory`.
        progress: called with (images done, images, what).

    Returns:
        The memory without its exponents, and d and r of every fitted image with itself and its near-copies left out of
        the entries and radii, each float32 N x L.

    Raises:
        FitError: fewer than two images that are no near-copies, or all entries from one of them.
    """
    if images < 2 + reach:
        raise FitError(
            "A memory of normal patches needs two images or more that are not copies of each other.",
            "The distances of normal patches are measured between different images.",
            "add normal images",
        )
    generator = torch.Generator().manual_seed(seed)
    pool, owner = _pool(rows, images, generator, progress)
    variance = pool.var(dim=0)
    weight = variance.clamp_min(max(1e-12, 1e-9 * float(variance.max()))) ** _WEIGHT_POWER
    pool *= weight
    sketch = torch.randn(pool.shape[1], _SKETCH, generator=generator) / _SKETCH**0.5
    chosen = _cover(pool @ sketch, min(entries, len(pool), max(_FEW, len(pool) // _SPARED)))
    held, held_image = pool[chosen], owner[chosen]
    provisional = Memory(held, torch.ones(len(held)), weight, search=search)
    vouching = [int(((held_image - index).abs() > reach).sum()) for index in range(images)]
    if (fewest := min(vouching)) == 0:
        raise FitError(
            f"All {len(held)} normal patches of the memory come from one image or its near-copies.",
            "Distances to patches of other images are unknown.",
            "--set memory=8192, or more normal images",
        )
    distances, neighbours = [], []
    for index in range(images):
        progress(index, images, "images, memory")
        z = rows(index)[None] * weight
        near = provisional.choose(z, (held_image - index).abs() <= reach, min(CANDIDATES, fewest))
        distances.append(compare(z, held[near], torch.ones(near.shape)).distance[0])
        nearest = (held[near] - z.unsqueeze(2)).square().sum(dim=3).argsort(dim=2)
        neighbours.append(near.gather(2, nearest)[0])
    distance, near = torch.stack(distances), torch.stack(neighbours)
    spread = _Spread(held, distance, near[..., 0])
    found = []
    for index in range(images):
        # An image that is unlike the others would widen the radii around itself.
        radius = spread.radii(slice(max(0, index - reach), index + reach + 1))
        near_patches = held[near[index]][None]
        found.append(compare(rows(index)[None] * weight, near_patches, radius[near[index]][None]).radius[0])
    return Memory(held, spread.radii(), weight, search=search), Nearest(distance, torch.stack(found))


def remember(
    features: FeatureSet,
    space: FeatureSpace,
    saae: SAAE,
    samples: Sequence[Sample],
    config: FitConfig,
    watch: Reporter,
) -> tuple[Memory, LeftOut]:
    """The memory of the fitted images, and how each of them scores as if it were new.

    Args:
        features: of the images.
        space, saae: fitted, on the CPU.
        samples: the images, in the order of `features`.
        config: of the fit, with a memory.
        watch: progress.

    Raises:
        FitError: fewer than two images that are no near-copies.
        ImageError: an image cannot be read.
    """

    def patches(index: int) -> Tensor:
        with torch.no_grad():
            return space(features.rows(index, index + 1)).g[0]

    count = len(samples)
    reach = sequence_reach(samples, labelled(watch.memory, "images, near-copies"))
    if reach:
        watch.say(
            "neighbours in the order of the names are near-copies (a burst or a video): each image is judged without "
            f"the {reach} before and after it"
        )
    search = None if space.basis is None else SEARCH  # components come by their variance, channels in no order
    memory, nearest = build_memory(patches, count, config.memory or 1, config.seed, reach, search, watch.memory)
    cosine = None
    if config.steps:  # else there is no autoencoder, and alpha stays 0
        cosines = []
        for index in range(count):
            watch.memory(index, count, "images, autoencoder")
            g = patches(index)[None]
            with torch.no_grad():
                cosines.append(anomaly_score(Projected(g), saae(g), "cosine"))
        cosine = torch.cat(cosines)
        memory.alpha.fill_(balance(nearest, cosine))
    without_level = memory_score(nearest, cosine, memory.alpha).reshape(-1, *saae.grid)
    memory.beta.fill_(level_exponent(without_level, config.smoothing))
    scores = memory_score(nearest, cosine, memory.alpha, memory.beta).reshape(-1, *saae.grid)
    names = tuple(distinct_names([sample.path for sample in samples]))
    return memory, LeftOut(scores, names, reach, content_hashes(samples))


def balance(nearest: Nearest, cosine: Tensor) -> float:
    """The exponent alpha of the score `memory`.

    In the log score of normal patches, the autoencoder's part then spreads 0.75 times as far as the memory's. If the
    autoencoder explains little (parts at any angle), its noise does not drown the distance.

    Args:
        nearest: d and r of normal patches that are not in the memory, any shape.
        cosine: 1 - cos(g, g_hat) of the same patches.
    """
    memory = (nearest.distance * nearest.radius.rsqrt()).log().std()
    return float(_SHARE * memory / cosine.clamp_min(1e-12).log().std().clamp_min(1e-6))


def level_exponent(scores: Tensor, smoothing: float) -> float:
    """The exponent beta of the score `memory`: how much of an image's own level is taken out of its scores.

    Over left-out normal images, the log of the largest score is regressed on the log of the mean. beta is a third of
    the slope. It is 0 if the level says nothing about the largest score, or with fewer than three images.

    Args:
        scores: of normal images that are not in the memory, without the level's factor, float32 N x h x w.
        smoothing: deviation of the map's Gaussian, in patches.
    """
    if len(scores) < 3:
        return 0.0
    rows, columns = (torch.tensor(gaussian_matrix(n, smoothing)) for n in scores.shape[1:])
    largest = (rows @ scores @ columns.T).amax(dim=(1, 2)).clamp_min(1e-12).log().double()
    level = scores.mean(dim=(1, 2)).clamp_min(1e-12).log().double()
    level = level - level.mean()
    slope = float((level * largest).sum() / level.square().sum().clamp_min(1e-12))
    return min(max(0.0, _LEVEL_SHARE * slope), _MOST_LEVEL)


def _pool(rows: Rows, images: int, generator: torch.Generator, progress: Progress) -> tuple[Tensor, Tensor]:
    """Patches to choose from, and the image of each."""
    parts, owner = [], []
    share = max(1, _POOL // images)
    for index in range(images):
        progress(index, images, "images, patches")
        patches = rows(index)
        if share < len(patches):
            patches = patches[torch.randperm(len(patches), generator=generator)[:share]]
        parts.append(patches)
        owner.append(torch.full((len(patches),), index))
    return torch.cat(parts), torch.cat(owner)


def _cover(points: Tensor, count: int) -> Tensor:
    """Numbers of `count` points, each far from those before it: points, n x width -> int64, count.

    Farthest first: from the farthest points of a pass, several are taken one after the other, so that one pass over
    the pool serves several entries.
    """
    energy = points.square().sum(dim=1)
    far = torch.full((len(points),), torch.inf)
    chosen = [int(energy.argmin())]
    fresh = chosen
    while len(chosen) < count:
        centres = points[fresh]
        to_fresh = (energy[None] - 2.0 * centres @ points.T).add_(energy[fresh][:, None]).amin(dim=0).clamp_min_(0)
        torch.minimum(far, to_fresh, out=far)
        far[fresh] = -1.0  # never twice, despite rounding
        among = far.topk(min(4 * _TOGETHER, len(points))).indices
        far_among, fresh = far[among].clone(), []
        for _ in range(min(_TOGETHER, count - len(chosen))):
            place = int(far_among.argmax())
            if far_among[place] < 0:
                break
            fresh.append(int(among[place]))
            apart = (points[among] - points[among[place]]).square().sum(dim=1)
            torch.minimum(far_among, apart, out=far_among)
            far_among[place] = -1.0
        chosen += fresh
    return torch.tensor(chosen)


class _Spread:
    """How far normal patches lie from the entries: radii of all images, and of all but some.

    Args:
        held: the entries, float32 B x k.
        distance: d of every image's patches with its own entries left out, float32 N x L.
        entry: the nearest entry of each of them, int64 N x L.
    """

    def __init__(self, held: Tensor, distance: Tensor, entry: Tensor) -> None:
        shape = len(distance), len(held)
        self._squared = torch.zeros(shape).scatter_add_(1, entry, distance.square())
        self._count = torch.zeros(shape).scatter_add_(1, entry, torch.ones_like(distance))
        every = Memory(held, torch.ones(len(held)), torch.ones(held.shape[1]))
        self._near = torch.cat(
            [every.choose(some[None], count=_POOLED + 1)[0] for some in held.split(1024)]
        )  # itself first
        self._prior = float(distance.square().mean())
        self._all = self._squared.sum(dim=0), self._count.sum(dim=0)

    def radii(self, without: slice = slice(0)) -> Tensor:
        """The root mean square of d near each entry, float32 B, over all images but those of a slice."""
        squared = self._all[0] - self._squared[without].sum(dim=0)
        count = self._all[1] - self._count[without].sum(dim=0)
        pooled, patches = squared.clamp_min(0.0)[self._near].sum(dim=1), count[self._near].sum(dim=1)
        return ((pooled + _PRIOR * self._prior) / (patches + _PRIOR)).clamp_min(1e-12).sqrt()
