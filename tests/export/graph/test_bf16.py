"""The score's arithmetic holds in bf16: residuals, not small differences of large sums."""

from __future__ import annotations

import pytest
import torch

from saae_train.model.detector import FeatureSpace, anomaly_score


def _features(seed: int) -> tuple[torch.Tensor, FeatureSpace]:
    """Features that lie almost wholly inside 32 of 256 components, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(256, 32, generator=generator))
    inside = torch.randn(4, 50, 32, generator=generator) * 8
    outside = torch.randn(4, 50, 256, generator=generator) * 0.2
    return inside @ basis.T + outside, FeatureSpace(torch.zeros(256), torch.ones(256), basis)


@pytest.mark.parametrize("kind", ["cosine", "joint"])
def test_the_score_in_bf16_moves_by_little(kind: str) -> None:
    f, space = _features(0)
    projected = space(f)
    g_hat = projected.g + 1.5 * torch.randn(projected.g.shape, generator=torch.Generator().manual_seed(1))
    expected = anomaly_score(projected, g_hat, kind)
    # What a device does that computes in bf16: every tensor is rounded, sums included.
    half = torch.bfloat16
    standard = f.to(half)
    basis = space.basis.to(half)
    g = standard @ basis
    residual = standard - g @ basis.T
    residual_energy, energy = ((x * x).sum(dim=2) for x in (residual, standard))
    rounded = projected._replace(g=g.float(), residual_energy=residual_energy.float(), energy=energy.float())
    found = anomaly_score(rounded, g_hat.to(half), kind)
    assert float(((found - expected).abs() / expected.mean()).max()) < 0.03
