"""The baselines against direct computations on small features."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from benchmarks.baselines import BASELINES, NearestNeighbour, Padim, PcaResidual, Standardised, baseline, k_centre


def features(images: int, seed: int = 0) -> np.ndarray:
    """[images, 6, 10] with most variance in three directions."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((3, 10))
    low = rng.standard_normal((images, 6, 3)) * 5
    return (low @ mixing + 0.1 * rng.standard_normal((images, 6, 10)) + 2.0).astype(np.float32)


def test_standardised_equals_scikit_learn_and_survives_a_dead_channel() -> None:
    train, test = features(20).astype(np.float16), features(1, seed=1)[0]
    train[:, :, 3] = 1.5
    scaler = StandardScaler().fit(train.reshape(-1, 10).astype(np.float64))
    images = Standardised(train)
    live = [c for c in range(10) if c != 3]
    np.testing.assert_allclose(images.apply(test)[:, live], scaler.transform(test)[:, live], rtol=1e-3, atol=1e-3)
    assert np.isfinite(np.stack(list(images))).all()
    assert np.abs(np.stack(list(images))[:, :, 3]).max() < 1e-3
    np.testing.assert_array_equal(Standardised(train, raw=True)[0], train[0].astype(np.float32))


def test_pca_residual_equals_scikit_learn() -> None:
    train, test = features(20), features(3, seed=1).reshape(-1, 10)
    model = PcaResidual(components=3)
    model.fit(list(train))
    pca = PCA(3).fit(train.reshape(-1, 10))
    expected = np.linalg.norm(test - pca.inverse_transform(pca.transform(test)), axis=1)
    np.testing.assert_allclose(model.score(test), expected, rtol=1e-3, atol=1e-3)


def test_padim_equals_scipy_at_every_position() -> None:
    train, test = features(40), features(1, seed=1)[0]
    model = Padim(channels=5, ridge=0.01, seed=3)
    model.fit(list(train))
    chosen = np.sort(np.random.default_rng(3).choice(10, 5, replace=False))
    for place, found in enumerate(model.score(test)):
        values = train[:, place, chosen].astype(np.float64)
        inverse = np.linalg.inv(np.cov(values.T) + 0.01 * np.eye(5))
        expected = mahalanobis(test[place, chosen], values.mean(axis=0), inverse)
        assert found == pytest.approx(expected, rel=1e-3)


def test_nearest_neighbour_with_the_whole_bank_is_the_smallest_distance() -> None:
    train, test = features(5), features(2, seed=1).reshape(-1, 10)
    model = NearestNeighbour(bank=1000)
    model.fit(list(train))
    expected = np.linalg.norm(test[:, None] - train.reshape(1, -1, 10), axis=2).min(axis=1)
    np.testing.assert_allclose(model.score(test), expected, rtol=1e-4)


def test_a_bank_holds_real_patches() -> None:
    train = features(20)
    model = NearestNeighbour(bank=40, projection=4)
    model.fit(list(train))
    scores = np.concatenate([model.score(image) for image in train])
    assert (scores < 1e-2).sum() >= 40  # the chosen ones find themselves
    assert (scores > 0.1).sum() > 20


@pytest.mark.parametrize("name", BASELINES)
def test_a_strange_patch_scores_highest(name: str) -> None:
    model, images = baseline(name, features(20).astype(np.float16))
    test = features(1, seed=1)[0]
    test[4] += np.linspace(-40, 40, 10, dtype=np.float32)
    if name != "knn":
        model = PcaResidual(components=3)  # the default would keep all ten channels
        model.fit(images)
    assert model.score(images.apply(test)).argmax() == 4


def test_k_centre_leaves_no_point_far_away() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.standard_normal((8, 5)) * 100
    points = (np.repeat(clusters, 50, axis=0) + rng.standard_normal((400, 5))).astype(np.float32)
    assert sorted(k_centre(points, 8) // 50) == list(range(8))  # one in each cluster, far apart as they are
