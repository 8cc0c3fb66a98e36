"""Baselines on the same patch features: a PCA residual, PaDiM, and PatchCore-style nearest neighbours.

All are fitted on a sequence of M normal images' features, each L x U float32 (L patch positions, U channels; read
one at a time, so it may be larger than memory), and score one image's features, L x U, to L values. Used only in
benchmarks.

  PCA residual  norm of what lies outside the leading k principal components.
  k-NN          distance to the nearest patch of a memory bank; the bank is a greedy k-centre subset
                of all training patches, picked on a random projection (Roth et al. 2022,
                "Towards Total Recall in Industrial Anomaly Detection", section 3.2).
  PaDiM         Mahalanobis distance to one Gaussian per position, over a random choice of channels (Defard et
                al. 2021, "PaDiM: a Patch Distribution Modeling Framework", sections III-A to III-C).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BASELINES",
    "Baseline",
    "Floats",
    "Images",
    "NearestNeighbour",
    "Padim",
    "PcaResidual",
    "Standardised",
    "baseline",
    "k_centre",
]

Floats = NDArray[np.float32]
Images = Sequence[Floats]


class Baseline(Protocol):
    """Fitted on normal images' features; scores one image's."""

    def fit(self, images: Images) -> None: ...

    def score(self, features: Floats) -> Floats: ...


class Standardised(Sequence[Floats]):
    """Features M x L x U of any float type (a memory map is fine) as images L x U float32, every channel with
    mean 0 and deviation 1 over all training patches; `raw` leaves them as they are."""

    def __init__(self, values: NDArray[Any], raw: bool = False) -> None:
        self._values = values
        channels = values.shape[2]
        self._mean, self._scale = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        if not raw:
            mean, square = np.zeros(channels), np.zeros(channels)
            for image in values:
                wide = image.astype(np.float64)
                mean += wide.mean(axis=0) / len(values)
                square += np.square(wide).mean(axis=0) / len(values)
            deviation = np.sqrt(np.maximum(square - mean**2, 0))
            # A channel that never varies must not be scaled by infinity.
            floor = 1e-6 * float(deviation.max(initial=0)) + 1e-12
            self._mean = mean.astype(np.float32)
            self._scale = (1 / np.maximum(deviation, floor)).astype(np.float32)

    def apply(self, features: NDArray[Any]) -> Floats:
        """The same standardisation for other features, ... x U."""
        return (features.astype(np.float32) - self._mean) * self._scale

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self.apply(self._values[index])


@dataclass
class PcaResidual:
    """Norm of f - mean outside the leading `components` principal components, all positions pooled."""

    components: int = 256

    def fit(self, images: Images) -> None:
        channels = images[0].shape[1]
        mean, covariance = np.zeros(channels), np.zeros((channels, channels))
        count = 0
        for image in images:
            mean += image.sum(axis=0, dtype=np.float64)
            covariance += image.T @ image
            count += len(image)
        mean /= count
        covariance = covariance / count - np.outer(mean, mean)
        _, vectors = np.linalg.eigh(covariance)
        k = min(self.components, channels)
        self._mean = mean.astype(np.float32)
        self._leading = vectors[:, ::-1][:, :k].astype(np.float32)

    def score(self, features: Floats) -> Floats:
        centred = features - self._mean
        outside = centred - (centred @ self._leading) @ self._leading.T
        return np.linalg.norm(outside, axis=-1).astype(np.float32)


@dataclass
class Padim:
    """Mahalanobis distance to the Gaussian of the same position, over `channels` random channels.

    The covariance gets 0.01 on its diagonal, as in the paper; on standardised channels that is a hundredth of their
    variance.
    """

    channels: int = 100
    ridge: float = 0.01
    seed: int = 0

    def fit(self, images: Images) -> None:
        width = images[0].shape[1]
        chooser = np.random.default_rng(self.seed)
        self._chosen = np.sort(chooser.choice(width, min(self.channels, width), replace=False))
        values = np.stack([image[:, self._chosen] for image in images])  # M x L x d
        self._mean = values.mean(axis=0)
        centred = (values - self._mean).transpose(1, 0, 2)  # L x M x d
        covariance = centred.transpose(0, 2, 1) @ centred / max(1, len(values) - 1)
        covariance += self.ridge * np.eye(covariance.shape[-1], dtype=np.float32)
        self._inverse = np.linalg.inv(covariance.astype(np.float64)).astype(np.float32)

    def score(self, features: Floats) -> Floats:
        centred = features[:, self._chosen] - self._mean
        squared = np.einsum("ld,lde,le->l", centred, self._inverse, centred, optimize=True)
        return np.sqrt(np.maximum(squared, 0)).astype(np.float32)


@dataclass
class NearestNeighbour:
    """Euclidean distance to the nearest of `bank` training patches."""

    bank: int = 8192
    projection: int = 64
    seed: int = 0

    def fit(self, images: Images) -> None:
        from sklearn.neighbors import NearestNeighbors
        from sklearn.random_projection import GaussianRandomProjection

        total = sum(len(image) for image in images)
        if self.bank < total:
            low = GaussianRandomProjection(self.projection, random_state=self.seed).fit(images[0])
            projected = np.concatenate([low.transform(image).astype(np.float32) for image in images])
            chosen = np.sort(k_centre(projected, self.bank, self.seed))
            patches, start = [], 0
            for image in images:
                inside = chosen[(chosen >= start) & (chosen < start + len(image))]
                patches.append(image[inside - start])
                start += len(image)
        else:
            patches = list(images)
        self._index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(np.concatenate(patches))

    def score(self, features: Floats) -> Floats:
        distance, _ = self._index.kneighbors(features)
        return distance[:, 0].astype(np.float32)


def k_centre(points: Floats, size: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices of `size` points such that no point is far from a chosen one (greedy: farthest point next)."""
    chosen = np.empty(size, np.int64)
    chosen[0] = np.random.default_rng(seed).integers(len(points))
    squares = np.einsum("ij,ij->i", points, points)
    nearest = np.full(len(points), np.inf, np.float32)
    for i in range(1, size):
        centre = points[chosen[i - 1]]
        np.minimum(nearest, squares - 2 * (points @ centre) + centre @ centre, out=nearest)
        chosen[i] = np.argmax(nearest)
    return chosen


def baseline(name: str, values: NDArray[Any]) -> tuple[Baseline, Standardised]:
    """Fit a baseline by name; return it, and the standardisation for the features given to `score`.

    values: the training features, M x L x U.
    """
    images = Standardised(values, raw=name == "pca-raw")
    kinds: dict[str, type[Baseline]] = {"knn": NearestNeighbour, "padim": Padim}
    model = kinds.get(name, PcaResidual)()
    model.fit(images)
    return model, images


BASELINES = ("pca", "pca-raw", "padim", "knn")
