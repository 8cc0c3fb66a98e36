"""The baselines against direct computations on small features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from benchmarks.baselines import NearestNeighbour, PcaResidual, k_centre


def features(images: int, seed: int = 0) -> np.ndarray:
    """[images, 6, 10] with most variance in three directions."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((3, 10))
    low = rng.standard_normal((images, 6, 3)) * 5
    return (low @ mixing + 0.1 * rng.standard_normal((images, 6, 10)) + 2.0).astype(np.float32)


def test_pca_residual_equals_scikit_learn() -> None:
    train, test = features(20), features(3, seed=1)
    model = PcaResidual(components=3)
    model.fit(train)
    pca = PCA(3).fit(train.reshape(-1, 10))
    flat = test.reshape(-1, 10)
    expected = np.linalg.norm(flat - pca.inverse_transform(pca.transform(flat)), axis=1)
    np.testing.assert_allclose(model.score(test).ravel(), expected, rtol=1e-3, atol=1e-3)


def test_nearest_neighbour_with_the_whole_bank_is_the_smallest_distance() -> None:
    train, test = features(5), features(2, seed=1)
    model = NearestNeighbour(bank=1000)
    model.fit(train)
    difference = test.reshape(-1, 1, 10) - train.reshape(1, -1, 10)
    expected = np.linalg.norm(difference, axis=2).min(axis=1)
    np.testing.assert_allclose(model.score(test).ravel(), expected, rtol=1e-4)


@pytest.mark.parametrize("model", [PcaResidual(components=3), NearestNeighbour(bank=40, projection=4)])
def test_a_strange_patch_scores_highest(model: PcaResidual | NearestNeighbour) -> None:
    model.fit(features(20))
    test = features(2, seed=1)
    test[1, 4] += np.linspace(-40, 40, 10, dtype=np.float32)
    assert np.unravel_index(model.score(test).argmax(), (2, 6)) == (1, 4)


def test_k_centre_leaves_no_point_far_away() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.standard_normal((8, 5)) * 100
    points = (np.repeat(clusters, 50, axis=0) + rng.standard_normal((400, 5))).astype(np.float32)
    chosen = k_centre(points, 8)
    assert sorted(chosen // 50) == list(range(8))  # one in each cluster, far apart as they are
