"""Collect anomaly maps and masks image by image, and rank all their pixels exactly.

Pixels of defect-free and of defective regions are kept separate: ranking then needs one plain sort of
the former (no index sort over all pixels) and a small one of the latter. Up to `exact_pixels` every
value is kept (4 bytes a float32 pixel, about as much again while ranking) and all results are exact.
Beyond that, values are counted in bins of 15 mantissa bits (relative width 2**-15 or finer): memory
stops growing with the number of pixels, and every metric carries the bound on its error.

Regions are connected components with 8-connectivity, as in the MVTec AD evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from saae_runtime.errors import DataError

from .ranking import Floats, Metric, Ranking, Rates, recall_at, require_finite

__all__ = ["EXACT_PIXELS", "PROFILE_BINS", "PixelPool", "Profiles"]

EXACT_PIXELS = 150_000_000  # about 1.2 GB at the peak with float32 maps
PROFILE_BINS = 2048

_EIGHT = np.ones((3, 3), dtype=bool)
_DROPPED_BITS = 8  # of a float32: 24 of 32 bits stay, 15 of them mantissa


@dataclass
class _Image:
    """Pixels of one image: defect-free values; defect values with the weight 1 / area of their region."""

    group: str
    negative: Floats
    positive: Floats
    weight: NDArray[np.float64]
    regions: int


@dataclass(frozen=True)
class Profiles:
    """Per-image histograms over common bins, which make resampling images cheap.

    Attributes:
        groups: group of each of the I images.
        negative, positive, weight: I x B, over B bins of ascending value.
        regions: I, number of ground-truth regions.
    """

    groups: list[str]
    negative: NDArray[np.float64]
    positive: NDArray[np.float64]
    weight: NDArray[np.float64]
    regions: NDArray[np.float64]


class _Bins:
    """Sparse histogram over the order-preserving integer keys of float32 values."""

    def __init__(self) -> None:
        self.keys = np.empty(0, np.uint32)
        self.counts = np.empty(0, np.int64)
        self.weights = np.empty(0, np.float64)

    def add(self, values: Floats, weights: NDArray[np.float64] | None = None) -> None:
        keys, inverse, counts = np.unique(_keys(values), return_inverse=True, return_counts=True)
        added = np.zeros(keys.size) if weights is None else np.bincount(inverse, weights, minlength=keys.size)
        merged, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        old, new = place[: self.keys.size], place[self.keys.size :]
        all_counts = np.zeros(merged.size, np.int64)
        all_counts[old] += self.counts
        all_counts[new] += counts
        all_weights = np.zeros(merged.size)
        all_weights[old] += self.weights
        all_weights[new] += added
        self.keys, self.counts, self.weights = merged, all_counts, all_weights


def _keys(values: Floats) -> NDArray[np.uint32]:
    """Map float32 values to unsigned integers of the same order, without their lowest bits."""
    bits = (values.astype(np.float32) + np.float32(0.0)).view(np.uint32)  # + 0 turns -0 into 0
    sign = np.uint32(0x80000000)
    ordered = np.where(bits & sign, ~bits, bits | sign)
    return ordered >> np.uint32(_DROPPED_BITS)


def _lower_edges(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    ordered = keys << np.uint32(_DROPPED_BITS)
    sign = np.uint32(0x80000000)
    return np.where(ordered & sign, ordered ^ sign, ~ordered).view(np.float32)


class PixelPool:
    """Pixels of many images, ready to be ranked; see the head of this file.

    `group` names a subset (a defect type, "good"); `ranking(groups)` ranks those subsets together.
    """

    def __init__(self, exact_pixels: int = EXACT_PIXELS) -> None:
        self.exact_pixels = exact_pixels
        self.pixels = 0
        self._images: list[_Image] = []
        self._sorted: dict[str, Floats] = {}
        self._binned: dict[str, tuple[_Bins, _Bins]] | None = None  # group -> (negative, positive)
        self._regions: dict[str, int] = {}
        self._edges: Floats | None = None
        self._profiles: list[tuple[str, NDArray[np.float64], int]] = []
        self._last_ranking: tuple[frozenset[str], Ranking] | None = None  # only the last one: a ranking can be large
        self._last_profiles: Profiles | None = None

    @classmethod
    def of(
        cls,
        maps: Iterable[ArrayLike],
        masks: Iterable[ArrayLike | None],
        groups: Sequence[str] | None = None,
        exact_pixels: int = EXACT_PIXELS,
    ) -> PixelPool:
        """A pool of maps H x W and masks H x W (None: no defect), each pair of its own size."""
        pool = cls(exact_pixels)
        count = 0
        sentinel = object()
        mask_iterator = iter(masks)
        for count, anomaly_map in enumerate(maps, start=1):
            mask = next(mask_iterator, sentinel)
            if mask is sentinel:
                raise DataError(f"more maps than masks: mask {count} is missing")
            group = "" if groups is None else groups[count - 1]
            pool.add(anomaly_map, mask, group=group)  # type: ignore[arg-type]
        if next(mask_iterator, sentinel) is not sentinel:
            raise DataError(f"more masks than maps: there are only {count} maps")
        return pool

    @property
    def exact(self) -> bool:
        """False once the pool has begun to bin values."""
        return self._binned is None

    @property
    def images(self) -> int:
        return len(self._profiles) if self._binned is not None else len(self._images)

    def add(
        self,
        anomaly_map: ArrayLike,
        mask: ArrayLike | None,
        group: str = "",
        name: str | None = None,
    ) -> None:
        """Add one image: anomaly_map H x W float; mask H x W, nonzero = defect, None = no defect.

        Raises DataError when the two differ in size, or the map holds NaN or infinity; `name` is
        what the message calls the image.
        """
        name = name or f"map {self.images + 1}"
        a = np.asarray(anomaly_map)
        if a.dtype not in (np.float32, np.float64):
            a = a.astype(np.float32)  # exact for float16, integers of a map and bool
        if a.ndim != 2:
            raise DataError(f"{name}: an anomaly map is H x W, got shape {a.shape}")
        require_finite(a, name)
        image = self._split(a, mask, group, name)
        self._last_ranking = self._last_profiles = None
        self.pixels += a.size
        self._regions[group] = self._regions.get(group, 0) + image.regions
        if self._binned is None:
            self._images.append(image)
            self._sorted.pop(group, None)
            if self.pixels > self.exact_pixels:
                self._start_binning()
        else:
            self._bin(image)

    @staticmethod
    def _split(a: Floats, mask: ArrayLike | None, group: str, name: str) -> _Image:
        none = np.empty(0, a.dtype)
        if mask is None:
            return _Image(group, a.flatten(), none, np.empty(0), 0)
        m = np.asarray(mask)
        if m.shape != a.shape:
            raise DataError(
                f"{name}: the map is {a.shape}, its mask {m.shape} (height, width)",
                "pixel metrics are taken at the image's own resolution",
                "bring the map to the image's size first (saae_runtime.geometry.upsample_map)",
            )
        m = m != 0
        rows = np.flatnonzero(m.any(axis=1))
        if rows.size == 0:
            return _Image(group, a.flatten(), none, np.empty(0), 0)
        columns = np.flatnonzero(m.any(axis=0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        inside = m[box]
        labels, regions = ndimage.label(inside, structure=_EIGHT)
        labels = labels[inside]
        areas = np.bincount(labels, minlength=regions + 1)
        weight = np.zeros(regions + 1)
        weight[1:] = 1.0 / areas[1:]
        return _Image(group, a[~m], a[box][inside], weight[labels], int(regions))

    def ranking(self, groups: Iterable[str] | None = None) -> Ranking:
        """Rank the pixels of the given groups (all of them by default) together."""
        chosen = frozenset(self._regions if groups is None else set(groups) & set(self._regions))
        if self._last_ranking is None or self._last_ranking[0] != chosen:
            self._last_ranking = None
            regions = sum(self._regions[g] for g in chosen)
            rank = self._exact_ranking if self._binned is None else self._binned_ranking
            self._last_ranking = (chosen, rank(chosen, regions))
        return self._last_ranking[1]

    def _exact_ranking(self, chosen: frozenset[str], regions: int) -> Ranking:
        images = [i for i in self._images if i.group in chosen]
        dtype = np.result_type(np.float32, *{i.negative.dtype for i in images})
        value = np.concatenate([np.empty(0, dtype), *(i.positive for i in images)])
        weight = np.concatenate([np.empty(0), *(i.weight for i in images)])
        order = np.argsort(value)
        value, weight = value[order], weight[order]
        del order
        first = np.flatnonzero(np.concatenate([np.ones(min(value.size, 1), bool), value[1:] != value[:-1]]))
        positives = np.diff(np.append(first, value.size))
        if first.size:
            weight = np.add.reduceat(weight, first)
        value = value[first]
        above, level = np.zeros(value.size, np.int64), np.zeros(value.size, np.int64)
        negatives = 0
        for group in sorted(chosen):
            negative = self._sorted_negatives(group)
            negatives += negative.size
            above += negative.size - np.searchsorted(negative, value, side="right")
            level += negative.size - np.searchsorted(negative, value, side="left")
        return self._finish(value, positives, weight, above, level, negatives, regions)

    def _finish(
        self,
        value: Floats,
        positives: NDArray[np.int64],
        weight: NDArray[np.float64],
        above: NDArray[np.int64],
        level: NDArray[np.int64],
        negatives: int,
        regions: int,
    ) -> Ranking:
        return Ranking(
            value[::-1],
            positives[::-1],
            weight[::-1] / max(regions, 1),
            above[::-1],
            level[::-1],
            negatives,
            regions,
            exact=self.exact,
            noun="pixel",
        )

    def _sorted_negatives(self, group: str) -> Floats:
        found = self._sorted.get(group)
        if found is None:
            found = np.concatenate([i.negative for i in self._images if i.group == group])
            found.sort()
            self._sorted[group] = found
        return found

    def rates(self, threshold: float, groups: Iterable[str] | None = None) -> Rates:
        """FPR and TPR over the pixels of the groups at T (`value > T` means defective)."""
        chosen = set(self._regions) if groups is None else set(groups) & set(self._regions)
        hit = total = straddling = 0
        for group in sorted(chosen):
            if self._binned is None:
                negative = self._sorted_negatives(group)
                hit += negative.size - int(np.searchsorted(negative, threshold, side="right"))
                total += negative.size
            else:
                bins = self._binned[group][0]
                edges = _lower_edges(bins.keys)
                n = int(np.searchsorted(edges, np.float32(threshold), side="right"))
                hit += int(bins.counts[n:].sum())
                straddling += int(bins.counts[n - 1]) if n else 0
                total += int(bins.counts.sum())
        fpr = (
            Metric(hit / total, error=straddling / total)
            if total
            else Metric(None, "no defect-free pixel in the test set")
        )
        return Rates(fpr, recall_at(self.ranking(chosen), threshold))

    # ---- beyond exact_pixels: bins ------------------------------------------------------------

    def _start_binning(self) -> None:
        self._edges = self._profile_edges()
        self._binned = {}
        self._sorted.clear()
        while self._images:
            self._bin(self._images.pop(0))

    def _bin(self, image: _Image) -> None:
        if self._binned is None or self._edges is None:
            raise RuntimeError("_bin is called only after _start_binning")
        negative, positive = self._binned.setdefault(image.group, (_Bins(), _Bins()))
        negative.add(image.negative)
        positive.add(image.positive, image.weight)
        self._profiles.append((image.group, _profile(image, self._edges), image.regions))

    def _binned_ranking(self, chosen: frozenset[str], regions: int) -> Ranking:
        if self._binned is None:
            raise RuntimeError("_binned_ranking is called only after _start_binning")
        keys = np.unique(np.concatenate([np.empty(0, np.uint32), *(self._binned[g][1].keys for g in chosen)]))
        positives, weight = np.zeros(keys.size, np.int64), np.zeros(keys.size)
        above, level = np.zeros(keys.size, np.int64), np.zeros(keys.size, np.int64)
        negatives = 0
        for group in chosen:
            negative, positive = self._binned[group]
            place = np.searchsorted(keys, positive.keys)
            positives[place] += positive.counts
            weight[place] += positive.weights
            below = np.concatenate([[0], np.cumsum(negative.counts)])
            negatives += int(below[-1])
            above += below[-1] - below[np.searchsorted(negative.keys, keys, side="right")]
            level += below[-1] - below[np.searchsorted(negative.keys, keys, side="left")]
        return self._finish(_lower_edges(keys), positives, weight, above, level, negatives, regions)

    # ---- per-image histograms for resampling ----------------------------------------------------

    def profiles(self) -> Profiles:
        """Histograms of each image over PROFILE_BINS bins, as bootstrap.py needs them."""
        if self._last_profiles is not None:
            return self._last_profiles
        rows = self._profiles
        if self._binned is None:
            edges = self._profile_edges()
            rows = [(i.group, _profile(i, edges), i.regions) for i in self._images]
        bins = rows[0][1].shape[1] if rows else 1
        table = np.stack([r[1] for r in rows]) if rows else np.zeros((0, 3, bins))
        regions = np.array([r[2] for r in rows], dtype=np.float64)
        self._last_profiles = Profiles([r[0] for r in rows], table[:, 0], table[:, 1], table[:, 2], regions)
        return self._last_profiles

    def _profile_edges(self) -> Floats:
        """Bin edges that split both the defect-free and the defect pixels about evenly."""
        sample = 200_000
        edges: list[Floats] = []
        for parts in ([i.negative for i in self._images], [i.positive for i in self._images]):
            total = sum(p.size for p in parts)
            step = max(1, total // sample)
            thinned = np.concatenate([np.empty(0, np.float32), *(p[step // 2 :: step] for p in parts)])
            if thinned.size:
                edges.append(np.quantile(thinned, np.linspace(0, 1, PROFILE_BINS // 2)))
                # The true extremes: where the two classes do not overlap, no bin may hold both.
                filled = [p for p in parts if p.size]
                edges.append(np.array([min(p.min() for p in filled), max(p.max() for p in filled)]))
        return np.unique(np.concatenate(edges)) if edges else np.empty(0)


def _profile(image: _Image, edges: Floats) -> NDArray[np.float64]:
    """3 x B counts of defect-free pixels, of defect pixels, and region weight in each bin."""
    negative = np.sort(image.negative)
    below = np.searchsorted(negative, edges.astype(negative.dtype), side="left")
    out = np.zeros((3, edges.size + 1))
    out[0] = np.diff(np.concatenate([[0], below, [negative.size]]))
    if image.positive.size:
        place = np.searchsorted(edges.astype(image.positive.dtype), image.positive, side="right")
        out[1] = np.bincount(place, minlength=edges.size + 1)
        out[2] = np.bincount(place, image.weight, minlength=edges.size + 1)
    return out
