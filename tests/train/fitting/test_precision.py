"""What a fit computes in: by device, and PyTorch's switches set for a block and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import noise_frames

from saae_train.config import PRECISIONS, FitConfig
from saae_train.data.category import Sample
from saae_train.fitting import features, fit, loop, precision
from saae_train.fitting.precision import arithmetic, matmul_precision, reached
from saae_train.model.vit import build_backbone

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # a name alone: no GPU is touched


@pytest.fixture(params=["of today", "older"])
def switches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is set for products; today's are PyTorch's own, which are there without a GPU."""
    if request.param == "older":
        backends = SimpleNamespace(
            cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False)), cudnn=SimpleNamespace(allow_tf32=True)
        )
        monkeypatch.setattr(precision.torch, "backends", backends)
    elif not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this PyTorch has the older switches alone")
    return lambda: [getattr(place, name) == tf32 for place, name, tf32, _ in precision._switches()]


def capability(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=0))


@pytest.mark.parametrize(
    ("major", "expected"),
    [
        (6, {"auto": "fp32", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}),  # the paper's GTX 1080 Ti
        (7, {"auto": "fp32", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}),  # bf16 would be emulated
        (8, {"auto": "bf16", "bf16": "bf16", "tf32": "tf32", "fp32": "fp32"}),
        (9, {"auto": "bf16", "bf16": "bf16", "tf32": "tf32", "fp32": "fp32"}),
    ],
)
def test_on_a_gpu(major: int, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    capability(major, monkeypatch)
    assert {name: arithmetic(name, GPU) for name in PRECISIONS} == expected


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [arithmetic(name, CPU) for name in ("bf16", "tf32", "fp32")] == ["bf16", "fp32", "fp32"]
    if hasattr(torch.cpu, "get_capabilities"):
        for has in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
            assert arithmetic("auto", CPU) == ("bf16" if has else "fp32")


def test_fp32_is_in_full_and_what_was_set_is_put_back(switches: Any) -> None:
    before = switches()
    assert before[1]  # PyTorch's default for convolutions: it has to be turned off
    for kind, inside in (("fp32", [False, False]), ("tf32", [True, True]), ("bf16", [False, False])):
        with matmul_precision(kind, GPU):
            assert switches() == inside
        assert switches() == before
        with pytest.raises(KeyError), matmul_precision(kind, GPU):
            raise KeyError
        assert switches() == before
    with matmul_precision("tf32", GPU), matmul_precision("fp32", GPU):
        assert switches() == [False, False]
    with matmul_precision("tf32", CPU):
        assert switches() == before


def test_what_the_caller_had_chosen_is_put_back(switches: Any) -> None:
    with matmul_precision("tf32", GPU):
        with matmul_precision("fp32", GPU):
            pass
        assert switches() == [True, True]


def test_what_is_reached_is_named(switches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability(8, monkeypatch)
    assert (reached(GPU, False), reached(GPU, True)) == ("fp32", "fp32, convolutions tf32")
    assert reached(CPU, True) == "fp32"
    with matmul_precision("fp32", GPU):
        assert reached(GPU, True) == "fp32"
    with matmul_precision("tf32", GPU):
        assert (reached(GPU, False), reached(GPU, True)) == ("tf32", "tf32")
    capability(7, monkeypatch)
    with matmul_precision("tf32", GPU):
        assert reached(GPU, True) == "fp32"


def test_the_callers_work_is_outside_and_a_fits_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features, the projection and every step are computed as chosen; what is called in between is not."""
    inside: list[str] = []
    seen: dict[str, set[tuple[str, ...]]] = {"features": set(), "project": set(), "step": set(), "reporter": set()}

    @contextmanager
    def noted(kind: str, device: torch.device) -> Iterator[None]:
        inside.append(kind)
        yield
        inside.pop()

    def watching(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[name].add(tuple(inside))
            return real(*arguments, **options)

        return call

    for index, frame in enumerate(noise_frames(3, (48, 48))):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    samples = [Sample(path, "good", None, False) for path in sorted(tmp_path.glob("*.png"))]
    backbone = build_backbone("test_vit2", (0, 2), (48, 48), "random")
    monkeypatch.setattr(type(backbone), "forward", watching("features", type(backbone).forward))
    monkeypatch.setattr(loop.FeatureSpace, "forward", watching("project", loop.FeatureSpace.forward))
    monkeypatch.setattr(loop, "anomaly_score", watching("step", loop.anomaly_score))
    for place in (features, loop):
        monkeypatch.setattr(place, "matmul_precision", noted)
        monkeypatch.setattr(place, "arithmetic", lambda precision, device: precision)
    config = FitConfig(
        input_size=(48, 48),
        components=24,
        latent=6,
        score="cosine",
        memory=None,
        held_out=0.15,
        steps=3,
        batch=2,
        precision="tf32",
    )
    watch = loop.Reporter(steps=watching("reporter", lambda *_: None))
    found = fit.fit(backbone, samples, config, "thing", device="cpu", cache=tmp_path / "cache", reporter=watch)
    assert seen == {"features": {("tf32",)}, "project": {("tf32",)}, "step": {("tf32",)}, "reporter": {()}}
    assert (found.record.precision, found.record.bf16) == ("tf32", False)
