"""The feature space that the autoencoder works in: standardisation, principal components, and the latent width V."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import FitConfig
from ..model.detector import FeatureSpace
from ..model.saae import latent_width
from .features import FeatureSet

__all__ = ["principal_components"]

_STATISTICS_ROWS = 60_000
"""Rows that mean, deviation and covariance are computed from, spread over all images and positions."""


def principal_components(features: FeatureSet, config: FitConfig) -> tuple[FeatureSpace, int]:
    """The feature space and V, from a sample of the training features' rows."""
    count, positions, channels = features.values.shape
    stride = max(1, count * positions // _STATISTICS_ROWS)
    # A stride that shares no factor with the row length visits every position of the grid.
    while stride > 1 and math.gcd(stride, positions) > 1:
        stride += 1
    rows = _strided(features, stride)
    mean = rows.mean(dim=0) if config.standardise else torch.zeros(channels)
    # A channel that never varies (a dead unit) must not be scaled by infinity.
    deviation = rows.std(dim=0).clamp_min(1e-6 * float(rows.std()) + 1e-12)
    scale = 1.0 / deviation if config.standardise else torch.ones(channels)
    standard = (rows - mean) * scale
    centred = standard - standard.mean(dim=0)
    covariance = (centred.T @ centred / max(1, len(rows) - 1)).double()
    if config.components is None:  # the vectors are not needed, and would take most of the time
        eigenvalues, vectors = torch.linalg.eigvalsh(covariance), None
    else:
        eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues = eigenvalues.flip(0).clamp_min(0)
    latent = config.latent or latent_width(eigenvalues, config.keep)
    if config.latent_limit is not None and config.latent is None:
        latent = min(latent, config.latent_limit // 3 * 3)
    if vectors is None:
        return FeatureSpace(mean, scale), latent
    k = min(config.components, channels // 2)  # leave residual energy
    leading = eigenvalues[:k].clamp_min(float(eigenvalues[0]) * 1e-9)
    weights = leading**-config.component_power
    return FeatureSpace(mean, scale, vectors.flip(1)[:, :k].float(), (weights / weights.mean()).float()), latent


def _strided(features: FeatureSet, stride: int) -> Tensor:
    parts, offset = [], 0
    for index in range(len(features)):
        rows = features.rows(index, index + 1)[0]
        parts.append(rows[offset::stride])
        offset = (offset - rows.shape[0]) % stride
    return torch.cat(parts)
