"""The two models of the paper's speed: what they are timed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import TINY

from saae_train.config import FitConfig
from saae_train.experiments import speed
from saae_train.fitting import precision


def test_products_are_in_full_on_a_gpu_and_put_back() -> None:
    before = [getattr(place, name) for place, name, _, _ in precision._switches()]
    with precision.matmul_precision("fp32", torch.device("cuda")):  # the switches are there without a GPU
        assert [getattr(place, name) for place, name, _, _ in precision._switches()] == [
            full for _, _, _, full in precision._switches()
        ]
    assert [getattr(place, name) for place, name, _, _ in precision._switches()] == before


def test_the_models_are_timed_within_full_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    inside: list[bool] = []

    @contextmanager
    def products(kind: str, device: torch.device) -> Iterator[None]:
        asked.append(kind)
        yield
        asked.append("")

    def interleaved(turns: Mapping[str, Callable[[float], object]], seconds: float) -> dict[str, list[float]]:
        inside.append(asked[-1] == "fp32")
        for turn in turns.values():
            turn(0.0)
        return {name: [0.01] for name in turns}

    def prepare(*_: Any) -> tuple[Callable[[], object], dict[str, Any]]:
        return (lambda: None), {}

    monkeypatch.setattr(precision, "matmul_precision", products)
    monkeypatch.setattr(speed, "interleaved", interleaved)
    monkeypatch.setattr(speed, "_prepare", prepare)
    found = speed.measure_fps({"SAAE": FitConfig(backbone=TINY)}, [], device="cpu")
    assert inside == [True]
    assert found["arithmetic"] == "fp32"
    assert found["models"]["SAAE"]["fps"] == pytest.approx(100)
