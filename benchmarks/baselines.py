"""Baselines on the same patch features: a PCA residual, and PatchCore-style nearest neighbours.

Both take the training features [M, L, U] of M normal images (L patch positions, U channels, float32) and give the
score map [N, L] of other images' features. They exist to be compared with, in benchmarks only.

  PCA residual  norm of what lies outside the leading k principal components.
  k-NN          distance to the nearest patch of a memory bank; the bank is a greedy k-centre subset
                of all training patches, picked on a random projection (Roth et al. 2022,
                "Towards Total Recall in Industrial Anomaly Detection", section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Baseline(Protocol):
    """Fitted on normal features [M, L, U]; scores features [N, L, U] to [N, L]."""

    def fit(self, features: Floats) -> None: ...

    def score(self, features: Floats) -> Floats: ...


@dataclass
class PcaResidual:
    """Norm of f - mean outside the leading `components` principal components, all positions pooled."""

    components: int = 256

    def fit(self, features: Floats) -> None:
        images, positions, channels = features.shape
        mean = np.zeros(channels)
        covariance = np.zeros((channels, channels))
        for image in features:  # one image at a time: features may be a memory map
            rows = image.astype(np.float32)
            mean += rows.sum(axis=0, dtype=np.float64)
            covariance += rows.T @ rows
        count = images * positions
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
class NearestNeighbour:
    """Euclidean distance to the nearest of `bank` training patches."""

    bank: int = 8192
    projection: int = 64
    seed: int = 0

    def fit(self, features: Floats) -> None:
        from sklearn.neighbors import NearestNeighbors
        from sklearn.random_projection import GaussianRandomProjection

        patches = features.reshape(-1, features.shape[-1])
        size = min(self.bank, len(patches))
        if size < len(patches):
            low = GaussianRandomProjection(self.projection, random_state=self.seed)
            patches = patches[k_centre(low.fit_transform(patches).astype(np.float32), size, self.seed)]
        self._index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(np.ascontiguousarray(patches))

    def score(self, features: Floats) -> Floats:
        distance, _ = self._index.kneighbors(features.reshape(-1, features.shape[-1]))
        return distance.reshape(features.shape[:-1]).astype(np.float32)


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


BASELINES: dict[str, type[PcaResidual] | type[NearestNeighbour]] = {"pca": PcaResidual, "knn": NearestNeighbour}
