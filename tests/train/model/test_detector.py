"""The feature space and the scores: exact energies, and equality with the features that were not projected."""

from __future__ import annotations

import pytest
import torch
from tiny_models import noise_frames, tiny_detector

from saae_runtime.errors import ConfigError
from saae_train.model.detector import SCORES, Detector, FeatureSpace, Projected, anomaly_score, memory_score
from saae_train.model.memory import Memory, Nearest

U, K = 40, 12


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def orthonormal(count: int) -> torch.Tensor:
    """U x count with orthonormal columns, as PCA gives them."""
    return torch.linalg.qr(torch.randn(U, U, dtype=torch.float64))[0][:, :count].float()


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(U), torch.rand(U) + 0.5


def test_without_basis_it_standardises_or_does_nothing() -> None:
    f = torch.randn(2, 5, U)
    mean, scale = statistics()
    projected = FeatureSpace(mean, scale)(f)
    torch.testing.assert_close(projected.g, (f - mean) * scale)
    assert projected.residual_energy is None
    assert projected.energy is None
    # The `paper` preset: raw features, bit for bit.
    assert torch.equal(FeatureSpace(torch.zeros(U), torch.ones(U))(f).g, f)


def test_residual_energy_is_the_energy_of_the_orthogonal_complement() -> None:
    full = orthonormal(U)
    mean, scale = statistics()
    space = FeatureSpace(mean, scale, full[:, :K], torch.linspace(1, 3, K))
    assert space.channels == K
    f = torch.randn(3, 7, U) * 4
    projected = space(f)
    standard = ((f - mean) * scale).double()
    complement = standard @ full[:, K:].double()
    assert projected.residual_energy is not None
    assert projected.energy is not None
    torch.testing.assert_close(projected.residual_energy.double(), complement.square().sum(2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(projected.energy.double(), standard.square().sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projected.g, (standard @ full[:, :K].double()).float() * torch.linspace(1, 3, K))


def test_residual_energy_is_never_negative() -> None:
    basis = orthonormal(K)
    inside = torch.randn(4, 9, K) @ basis.T  # nothing outside but rounding
    residual = FeatureSpace(torch.zeros(U), torch.ones(U), basis)(inside * 100).residual_energy
    assert residual is not None
    assert (residual >= 0).all()
    assert residual.max() < 1e-5 * (inside * 100).square().sum(2).max()


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_a_full_basis_gives_the_scores_of_unprojected_features(kind: str) -> None:
    basis = orthonormal(U)
    f, f_hat = torch.randn(2, 6, U), torch.randn(2, 6, U)
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), basis)(f)
    plain = anomaly_score(Projected(f), f_hat, kind)
    torch.testing.assert_close(anomaly_score(projected, f_hat @ basis, kind), plain, rtol=1e-4, atol=1e-4)


def test_l2_with_components_is_the_distance_in_the_whole_space() -> None:
    """Eq. (3) on what g_hat stands for: its components, and nothing outside them."""
    basis = orthonormal(K)
    f, g_hat = torch.randn(2, 6, U), torch.randn(2, 6, K)
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), basis)(f)
    expected = (f - g_hat @ basis.T).norm(dim=2)
    torch.testing.assert_close(anomaly_score(projected, g_hat, "l2"), expected, rtol=1e-4, atol=1e-5)


def test_scores_by_definition() -> None:
    g, g_hat = torch.randn(2, 6, K), torch.randn(2, 6, K)
    torch.testing.assert_close(anomaly_score(Projected(g), g_hat, "l2"), torch.linalg.vector_norm(g - g_hat, dim=2))
    cosine = 1 - torch.nn.functional.cosine_similarity(g, g_hat, dim=2)
    torch.testing.assert_close(anomaly_score(Projected(g), g_hat, "cosine"), cosine)
    basis = orthonormal(K)
    f = torch.randn(2, 6, U)
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), basis)(f)
    cosine = 1 - torch.nn.functional.cosine_similarity(f @ basis, g_hat, dim=2)
    perpendicular = (f - f @ basis @ basis.T).square().sum(2)
    expected = cosine**0.25 * (perpendicular / f.norm(dim=2)).sqrt()
    torch.testing.assert_close(anomaly_score(projected, g_hat, "joint"), expected, rtol=1e-4, atol=1e-5)


def some_memory() -> Memory:
    generator = torch.Generator().manual_seed(3)
    return Memory(torch.randn(20, K, generator=generator), torch.ones(20), torch.ones(K), alpha=0.3, beta=0.25)


def test_memory_score_is_its_formula() -> None:
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), orthonormal(K))(torch.randn(2, 9, U))
    g_hat, memory = projected.g + 0.3 * torch.randn_like(projected.g), some_memory()
    d, r = memory(projected.g)
    cosine = torch.nn.functional.cosine_similarity(projected.g, g_hat, dim=2)
    expected = d / r.sqrt() * (1 - cosine) ** 0.3
    expected = expected / expected.mean(dim=1, keepdim=True) ** 0.25
    torch.testing.assert_close(anomaly_score(projected, g_hat, "memory", memory), expected, rtol=1e-4, atol=1e-5)


def test_an_image_that_differs_everywhere_stands_out_less() -> None:
    generator = torch.Generator().manual_seed(7)
    distance, ones = 1 + torch.rand(1, 50, generator=generator), torch.ones(1, 50)
    plain, far = (memory_score(Nearest(scale * distance, ones), None, 0.0, 0.3) for scale in (1.0, 2.0))
    torch.testing.assert_close(far, 2**0.7 * plain)
    one = distance.clone()
    one[0, 20] *= 2.0  # a single patch keeps nearly all of its contrast
    assert float((memory_score(Nearest(one, ones), None, 0.0, 0.3) / plain)[0, 20]) > 1.98
    torch.testing.assert_close(memory_score(Nearest(distance, ones), None, 0.0), distance)
    assert bool(torch.isfinite(memory_score(Nearest(0.0 * distance, ones), None, 0.0, 0.3)).all())


@pytest.mark.parametrize("kind", SCORES)
def test_scores_are_float32_finite_and_have_gradients_everywhere(kind: str) -> None:
    basis = orthonormal(K)
    f = torch.stack([torch.randn(3, U), torch.zeros(3, U), 1e4 * torch.randn(3, U)])
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), basis)(f)
    g_hat = projected.g.clone()  # a perfect reconstruction: the norm's gradient is not defined there
    g_hat[0] += 0.1
    g_hat.requires_grad_()
    memory = some_memory()
    score = anomaly_score(projected, g_hat, kind, memory)
    assert score.dtype == torch.float32
    assert torch.isfinite(score).all()
    score.sum().backward()
    assert torch.isfinite(g_hat.grad).all()
    # What comes in as bfloat16 (autocast) is summed in float32 all the same.
    assert anomaly_score(projected, g_hat.bfloat16(), kind, memory).dtype == torch.float32


@pytest.mark.parametrize("kind", SCORES)
def test_a_better_reconstruction_scores_lower(kind: str) -> None:
    projected = FeatureSpace(torch.zeros(U), torch.ones(U), orthonormal(K))(torch.randn(4, 9, U))
    noise = torch.randn_like(projected.g)
    means = [
        anomaly_score(projected, projected.g + size * noise, kind, some_memory()).mean() for size in (0.1, 0.5, 2.0)
    ]
    assert means[0] < means[1] < means[2]


def test_unknown_scores() -> None:
    with pytest.raises(ConfigError, match="no score named 'l1'") as caught:
        anomaly_score(Projected(torch.ones(1, 1, 3)), torch.ones(1, 1, 3), "l1")
    assert "l2" in caught.value.cure
    with pytest.raises(ConfigError, match="`joint` needs components"):
        anomaly_score(Projected(torch.ones(1, 1, 3)), torch.ones(1, 1, 3), "joint")
    with pytest.raises(ConfigError, match="needs a memory"):
        anomaly_score(Projected(torch.ones(1, 1, 3)), torch.ones(1, 1, 3), "memory")
    whole = tiny_detector(size=(32, 32), layers=(0, 1))
    with pytest.raises(ConfigError, match="no score named"):
        Detector(whole.backbone, whole.space, whole.saae, "l1")


@pytest.mark.parametrize("options", [{}, {"components": 24, "score": "joint"}, {"transformer": False}])
def test_pixels_to_map(options: dict) -> None:
    detector = tiny_detector(size=(32, 48), layers=(0, 1), **options)
    frames = torch.from_numpy(noise_frames(2, (32, 48))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        found = detector(frames)
        # Written out: normalise as timm says, features, space, autoencoder, score.
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (detector.backbone.mean, detector.backbone.std))
        f = detector.backbone((frames / 255 - mean) / std)
        projected = detector.space(f)
        expected = anomaly_score(projected, detector.saae(projected.g), detector.score)
        assert found.shape == (2, 2, 3)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(detector(frames.float()), found)
        torch.testing.assert_close(detector(frames[1:]), found[1:], rtol=1e-4, atol=1e-5)
    assert not detector.training
