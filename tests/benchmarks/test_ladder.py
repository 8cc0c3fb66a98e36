"""benchmarks/ladder.py: PaDiM's graph is a Mahalanobis distance in both libraries, and ratios are to the default's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from needs import need

from benchmarks.ladder import HEADINGS, PadimResNet18, measured, padim_calls, table
from benchmarks.report import render
from saae_runtime.errors import ConfigError

MACHINE = {"cpu": "a CPU", "cores": 2, "python": "3.11"}


def test_padim_is_the_mahalanobis_distance_at_each_position() -> None:
    torch.manual_seed(0)
    model = PadimResNet18(side=64, channels=7).eval()
    frame = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    factors = torch.randn(256, 7, 7)
    model.inverse = factors @ factors.mT  # positive definite, as an inverse covariance is
    with torch.no_grad():
        found = model(frame)
        first, second, third = model.network(frame.permute(0, 3, 1, 2).float() / 255.0)
    assert found.shape == (2, 16, 16)
    place = (1, 5, 9)
    stacked = torch.cat([first[1, :, 5, 9], second[1, :, 2, 4], third[1, :, 1, 2]])
    apart = (stacked[model.chosen] - model.mean[:, 5, 9]).numpy()
    expected = np.sqrt(apart @ model.inverse[5 * 16 + 9].numpy() @ apart)
    np.testing.assert_allclose(found[place], expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_both_libraries_compute_the_same(tmp_path: Path) -> None:
    need("openvino")
    torch.manual_seed(0)
    calls = padim_calls(tmp_path, threads=1, side=64)
    frame = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    one, other = (np.asarray(calls[name](frame)[0]) for name in ("onnxruntime:cpu", "openvino"))  # type: ignore[index]
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    assert one.std() > 0


def test_ratios_are_to_the_defaults_fp32_on_the_faster_backend() -> None:
    rows = [
        {"preset": p, "precision": q, "backend": b, "input": "8x8", "timing": {"median_ms": ms, "p95_ms": ms}}
        for p, q, b, ms in (("fast", "fp32", "a", 12.0), ("fast", "fp32", "b", 10.0), ("lite", "int8", "a", 2.0))
    ]
    assert [line[-1] for line in table(rows)] == [10 / 12, 1.0, 5.0]
    assert {len(line) for line in table(rows)} == {len(HEADINGS)}
    shown = render({"benchmark": "ladder", "rows": rows, "machine": MACHINE, "command": "c", "created": "2026-11-26"})
    assert f"| {HEADINGS[-1]} |" in shown
    assert "| lite | int8 | a | 8x8 | 2 | 2 | 5 |" in shown


def test_a_preset_without_the_packaged_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="paper"):
        measured(["paper"], ["fp32"], 1, 1.0)
