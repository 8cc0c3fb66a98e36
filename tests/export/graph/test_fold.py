"""Folded layers against the chains they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saae_export.graph.fold import (
    fold_batchnorm,
    fold_input_norm,
    fold_output_scale,
    fold_padded_input_norm,
    merge_linears,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _close(a: torch.Tensor, b: torch.Tensor, share: float = 2e-6) -> None:
    assert (a - b).abs().max() <= share * a.abs().max()


def test_input_norm_goes_into_a_padding_free_convolution() -> None:
    conv = nn.Conv2d(3, 8, 4, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.randint(0, 256, (2, 3, 16, 12)).float()
    expected = conv((x / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))
    _close(expected, fold_input_norm(conv, mean, std)(x))
    _close(expected, fold_input_norm(conv, mean, std, zero=100.0)(x - 100.0))


def test_input_norm_refuses_a_padded_convolution() -> None:
    with pytest.raises(ValueError, match="padding-free"):
        fold_input_norm(nn.Conv2d(3, 8, 3, padding=1), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("bias", [True, False])
def test_output_scale(bias: bool) -> None:
    linear, scale = nn.Linear(6, 5, bias=bias), torch.randn(5)
    x = torch.randn(4, 6)
    _close(linear(x) * scale, fold_output_scale(linear, scale)(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_in_evaluation_mode(bias: bool, affine: bool) -> None:
    linear, norm = nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5, affine=affine)
    for _ in range(3):
        norm(linear(torch.randn(32, 6) * 3 + 1))
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.eval()
    x = torch.randn(4, 6)
    before = linear.weight.clone()
    _close(norm(linear(x)), fold_batchnorm(linear, norm)(x))
    assert torch.equal(before, linear.weight), "the original was changed"


def test_batchnorm_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        fold_batchnorm(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize(("first_bias", "second_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_two_linear_layers_become_one(first_bias: bool, second_bias: bool) -> None:
    first, second = nn.Linear(6, 9, bias=first_bias), nn.Linear(9, 4, bias=second_bias)
    x = torch.randn(4, 6)
    _close(second(first(x)), merge_linears(first, second)(x))


@pytest.mark.parametrize("pieces", [2, 9])
def test_a_layer_at_every_piece_of_another_becomes_one(pieces: int) -> None:
    """A convolution at each position of a patch before its projection, and behind it."""
    at_each, project = nn.Linear(5, 3), nn.Linear(3 * pieces, 4)
    x = torch.randn(6, pieces, 5)
    found = merge_linears(at_each, project)(x.flatten(1))
    _close(project(at_each(x).flatten(1)), found)

    spread, each = nn.Linear(4, 3 * pieces), nn.Linear(3, 5)
    y = torch.randn(6, 4)
    found = merge_linears(spread, each)(y)
    _close(each(spread(y).unflatten(1, (pieces, 3))).flatten(1), found)


@pytest.mark.parametrize("bias", [True, False])
def test_input_norm_goes_into_a_padded_convolution_with_ones(bias: bool) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    x = torch.rand(2, 3, 7, 6) * 255
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    for zero in (0.0, 128.0):
        shifted = torch.cat([x - zero, torch.ones(2, 1, 7, 6)], dim=1)
        _close(conv((x / 255 - shift) / scale), fold_padded_input_norm(conv, mean, std, zero=zero)(shifted))
