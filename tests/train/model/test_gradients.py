"""The gradients written out for CPUs are those of PyTorch's own formulas, rounded a little differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from saae_train.fitting.process import set_for_training
from saae_train.model import gradients
from saae_train.model import saae as model
from saae_train.model.detector import Projected, anomaly_score
from saae_train.model.saae import SAAE

CLOSE = 0.02
"""Of the gradient's norm; bfloat16 has eight binary digits."""


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def compare(found: Callable[..., Tensor], wanted: Callable[..., Tensor], values: list[Tensor]) -> None:
    """Outputs and gradients of a bfloat16 function against a float32 one."""
    half = [value.clone().requires_grad_() for value in values]
    full = [value.float().requires_grad_() for value in values]
    a, b = found(*half), wanted(*full)
    assert a.dtype == torch.bfloat16
    assert a.shape == b.shape
    outer = inputs(tuple(a.shape))[0]
    a.backward(outer)
    b.backward(outer.float())
    pairs = [(a.detach(), b.detach()), *((x.grad, y.grad) for x, y in zip(half, full, strict=True))]
    for index, (x, y) in enumerate(pairs):
        assert (x.float() - y).norm() < CLOSE * y.norm(), index


def plain_attention(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    q = query.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in key_value.chunk(2, dim=2))
    mixing = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3)
    return (mixing @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(3, 20, 33, 24), (1, 5, 5, 8), (2, 1, 70, 36)])
def test_attention(heads: int, queries: int, keys: int, width: int) -> None:
    compare(
        lambda a, b: gradients.attention(a, b, heads),
        lambda a, b: plain_attention(a, b, heads),
        inputs((3, queries, width), (3, keys, 2 * width)),
    )


def test_attention_of_queries_that_are_one_for_all_images() -> None:
    compare(
        lambda a, b: gradients.attention(a.expand(4, -1, -1), b, 3),
        lambda a, b: plain_attention(a.expand(4, -1, -1), b, 3),
        inputs((1, 10, 12), (4, 10, 24)),
    )


@pytest.mark.parametrize("wide", [False, True])
def test_linear(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_WIDE", 1 if wide else 1 << 60)
    compare(gradients.linear, functional.linear, inputs((2, 30, 11), (7, 11), (7,)))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.floats(-3, 3), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_cosine_distance(n: int, length: int, channels: int, power: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, length, channels, generator=generator) * 10.0**power
    b = torch.randn(n, length, channels, generator=generator).requires_grad_()
    c = b.detach().double().requires_grad_()
    found, wanted = gradients.cosine_distance(a, b), 1 - functional.cosine_similarity(a.double(), c, dim=2, eps=1e-12)
    outer = torch.randn(n, length, generator=generator)
    found.backward(outer)
    wanted.backward(outer.double())
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    # Two terms of the size of 1/|b| are subtracted: so large are the parts that are rounded.
    rounded = (b.grad.double() - c.grad).abs() * c.detach().norm(dim=2, keepdim=True) / outer.abs().unsqueeze(2)
    assert float(rounded.max()) < 1e-5


def test_cosine_distance_of_rows_of_zeros_is_finite() -> None:
    a, b = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).requires_grad_()
    a[0, 0] = 1.0
    found = gradients.cosine_distance(a, b)
    found.sum().backward()
    assert found.tolist() == [[1.0, 1.0]]
    assert torch.isfinite(b.grad).all()
    assert (b.grad[0, 0] < 0).all()


def test_the_loss_is_the_score_and_takes_the_short_way() -> None:
    generator = torch.Generator().manual_seed(3)
    g, g_hat = torch.randn(2, 2, 7, 12, generator=generator).unbind(0)
    with_gradient = anomaly_score(Projected(g), g_hat.clone().requires_grad_(), "cosine")
    assert type(with_gradient.grad_fn).__name__.startswith("_CosineDistance")
    assert torch.allclose(with_gradient, anomaly_score(Projected(g), g_hat, "cosine"), atol=1e-6)


def step(saae: SAAE, f: Tensor, bf16: bool) -> dict[str, Tensor]:
    saae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = saae(f)
    (found.float() * torch.linspace(-1, 1, f.shape[2])).sum().backward()
    return {name: value.grad.clone() for name, value in saae.named_parameters()}


def test_the_model_uses_them_in_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    saae, f = SAAE(32, 12, 20).train(), torch.randn(4, 20, 32)
    called: list[str] = []

    def counting(name: str) -> Callable[..., Tensor]:
        real: Callable[..., Tensor] = getattr(gradients, name)

        def call(*arguments: object) -> Tensor:
            called.append(name)
            return real(*arguments)

        return call

    for name in ("linear", "attention"):
        monkeypatch.setattr(gradients, name, counting(name))
    step(saae, f, bf16=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        saae(f)
    with torch.autocast("cpu", torch.float16):
        saae(f)
    assert called == []
    ours = step(saae, f, bf16=True)
    assert called.count("attention") == 3
    assert called.count("linear") == sum(isinstance(part, model.Linear) for part in saae.modules())
    monkeypatch.setattr(model, "_trains_in_bf16", lambda x: False)
    theirs = step(saae, f, bf16=True)
    total = torch.cat([value.flatten() for value in theirs.values()])
    difference = torch.cat([(ours[name] - value).flatten() for name, value in theirs.items()])
    assert difference.norm() < CLOSE * total.norm()


def test_denormals_count_only_outside_the_block() -> None:
    tiny = torch.tensor([1e-39])
    with set_for_training():
        inside = float((tiny * 1.0)[0])
    assert inside == 0.0
    assert float((tiny * 1.0)[0]) > 0.0
