"""The variants that `fps.py` times: PyTorch's, and every backend and precision that works here."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.dfr import INPUT, dfr
from benchmarks.torch_variants import Deployed, TorchBackend, score_frames, torch_backend, torch_variants
from saae_runtime import backends
from saae_runtime.backends.base import Backend
from saae_runtime.bundle import Bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError, BackendUnavailableError, ConfigError
from saae_runtime.manifest import PRECISIONS
from saae_train.model.detector import Detector

__all__ = [
    "REFERENCE",
    "Settings",
    "Variant",
    "check_names",
    "known_names",
    "open_variants",
]

REFERENCE = ("pytorch", "fp32")
_TORCH = ("pytorch", "pytorch:fused", "pytorch:compile", "pytorch:cudagraph")
_OTHER_MODELS = ("dfr", "pytorch:whole")
_ON_CPU = ("onnxruntime:cpu", "openvino")
_NAMED_ONLY = {"onnxruntime:tensorrt": "compiles for minutes at its first start; name it in --backends"}


@dataclass(frozen=True)
class Settings:
    """What to time, and how.

    Attributes:
        frame_size: (H, W) of the camera's frames.
        batches: batch sizes.
        backends: names, or None for all that work here.
        precisions: names, or None for all.
        seconds: time for each timing of each variant.
        threads: CPU threads of every variant.
        device: `cpu` or `cuda`: where PyTorch runs, and which backends it is compared with.
        hint: `latency` or `throughput`, for OpenVINO.
        dfr: whether DFR is timed too.
        whole: whether the model without components is timed too.
        kinds: of timing; None for all.
    """

    frame_size: tuple[int, int] = (1024, 1024)
    batches: tuple[int, ...] = (1,)
    backends: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    seconds: float = 10.0
    threads: int = 1
    device: str = "cpu"
    hint: str = "latency"
    dfr: bool = False
    whole: bool = False
    kinds: tuple[str, ...] | None = None


@dataclass
class Variant:
    """One way to run the model, open and ready.

    Attributes:
        name, precision: as in the table.
        backend: computes.
        engine: around it, None for PyTorch's.
        memory_mib: growth of this process's resident memory by opening it and running it once.
        device_mib: memory taken on the GPU meanwhile; None without one.
        map_error: largest difference of its anomaly map from the reference's over the reference's largest value, on
            one noise frame; None if they have different weights.
    """

    name: str
    precision: str
    backend: Backend
    engine: Engine | None = None
    memory_mib: float = 0.0
    device_mib: float | None = None
    map_error: float | None = None
    limits: tuple[float, float] = field(default=(float(np.finfo(np.float32).max),) * 2)

    @property
    def key(self) -> str:
        return f"{self.name} {self.precision}"

    def infer(self, frames: NDArray[np.uint8]) -> Any:
        """Compute only: a batch at the graph's size."""
        return self.backend.infer(frames, self.limits[0])

    def score(self, frames: Sequence[NDArray[np.uint8]]) -> Any:
        """Camera frames to results."""
        if self.engine is None:
            return score_frames(self.backend, frames, *self.limits)
        return self.engine(frames[0] if len(frames) == 1 else list(frames))

    def close(self) -> None:
        (self.engine or self.backend).close()


def known_names() -> list[str]:
    """Every name that `--backends` takes."""
    return [*_TORCH, *backends.BACKENDS]


def check_names(settings: Settings) -> None:
    """Refuse unknown names before anything is built.

    Raises:
        ConfigError: an unknown backend or precision, with near names.
    """
    for what, given, known in (
        ("backend", settings.backends, known_names()),
        ("precision", settings.precisions, list(PRECISIONS)),
    ):
        for name in given or ():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(
                    f"There is no {what} {name!r}.",
                    f"Known are: {', '.join(known)}.",
                    f"did you mean {near[0]}?" if near else f"leave --{what}s out for all that work here",
                )


def open_variants(
    bundle: Bundle, detector: Detector, settings: Settings, same_weights: bool = True
) -> tuple[list[Variant], list[dict[str, str]]]:
    """Open everything that is to be timed; the reference, PyTorch eager FP32, comes first.

    Args:
        bundle: what the backends run.
        detector: what PyTorch runs.
        settings: see there.
        same_weights: whether the two are the same model, so that their maps can be compared.

    Returns:
        The variants, and the missing ones: {backend, precision, why}.

    Raises:
        BackendError: a backend that was named in the settings cannot be used here.
    """
    check_names(settings)
    found: list[Variant] = []
    absent: list[dict[str, str]] = []
    try:
        for name, precision, open_it in _plans(bundle, detector, settings, absent):
            try:
                found.append(_opened(name, precision, open_it))
            except (BackendError, ConfigError) as error:
                if not found:
                    raise  # the reference
                absent.append({"backend": name, "precision": precision, "why": f"{error.what} {error.why}".strip()})
        _require_all(settings, found, absent)
        if same_weights:
            _compare(found)
    except BaseException:
        for variant in found:
            variant.close()
        raise
    return found, absent


def _plans(
    bundle: Bundle, detector: Detector, settings: Settings, absent: list[dict[str, str]]
) -> Iterator[tuple[str, str, Callable[[], Backend | Engine]]]:
    size = (bundle.manifest.frame.height, bundle.manifest.frame.width)
    usual = torch_variants(settings.device)
    for name in _TORCH:
        wanted = name in usual if settings.backends is None else name in settings.backends
        for precision in dict.fromkeys(("fp32", *(settings.precisions or usual.get(name, ("bf16",))))):
            is_reference = (name, precision) == REFERENCE
            if is_reference or (wanted and _chosen(settings, precision) and not precision.startswith("int8")):
                yield name, precision, partial(torch_backend, name, precision, detector, size, settings.device)
    for name, precision, options in _runtime_plans(bundle, settings, absent):
        yield name, precision, partial(Engine, bundle, backend=name, precision=precision, **options)
    if settings.whole and detector.space.basis is not None:
        yield "pytorch:whole", "fp32", partial(_whole, bundle, size, settings.device)
    if settings.dfr:
        yield "dfr", "fp32", lambda: TorchBackend("dfr", "fp32", dfr(), INPUT, settings.device)


def _runtime_plans(
    bundle: Bundle, settings: Settings, absent: list[dict[str, str]]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name in backends.BACKENDS:
        if settings.backends is not None and name not in settings.backends:
            continue
        if settings.backends is None and (name in _NAMED_ONLY or (name in _ON_CPU) != (settings.device == "cpu")):
            why = _NAMED_ONLY.get(name, f"not beside PyTorch on {settings.device}; see --device")
            absent.append({"backend": name, "precision": "", "why": why})
            continue
        options: dict[str, Any] = {"verify": False, "max_batch": max(settings.batches)}
        if name in _ON_CPU:
            options["threads"] = settings.threads
        graphs = bundle.manifest.precisions()
        if name == "openvino":
            options["hint"] = settings.hint
        for precision in settings.precisions or graphs:
            found = backends.candidates(bundle, 0, precision)
            here = next(item for item in found if item.name == name)
            if here.why_not is not None:
                absent.append({"backend": name, "precision": precision, "why": here.why_not})
                continue
            yield name, precision, options


def _whole(bundle: Bundle, size: tuple[int, int], device: str) -> TorchBackend:
    from benchmarks.random_model import like, without_components

    detector = without_components(like(bundle.manifest)).detector
    return TorchBackend("pytorch:whole", "fp32", Deployed(detector, size), size, device)


def _chosen(settings: Settings, precision: str) -> bool:
    return settings.precisions is None or precision in settings.precisions


def _require_all(settings: Settings, found: Sequence[Variant], absent: Sequence[dict[str, str]]) -> None:
    for name in settings.backends or ():
        if not any(variant.name == name for variant in found):
            reasons = [item["why"] for item in absent if item["backend"] == name]
            raise BackendUnavailableError(
                f"The backend {name} was asked for and cannot be timed here.",
                "; ".join(dict.fromkeys(reasons)) or "the bundle has nothing for it at the chosen precisions",
                "saae-export doctor says what is missing; or leave it out of --backends",
            )


def _opened(name: str, precision: str, open_it: Callable[[], Backend | Engine]) -> Variant:
    gc.collect()
    before, device_before = common.resident_mib(), _device_mib()
    opened = open_it()
    if isinstance(opened, Engine):
        limits = (opened.threshold, opened.image_threshold)
        variant = Variant(name, precision, opened.backend, opened, limits=limits)
    else:
        variant = Variant(name, precision, opened)
    try:
        variant.infer(np.zeros((1, *variant.backend.frame_size, 3), np.uint8))
    except BaseException:
        variant.close()
        raise
    variant.memory_mib = common.resident_mib() - before
    if device_before is not None:
        variant.device_mib = (_device_mib() or 0.0) - device_before
    return variant


def _device_mib() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def _compare(variants: Sequence[Variant]) -> None:
    """Whether all variants compute the same result: the speed of a wrong answer means nothing."""
    reference = variants[0]
    frame = np.random.default_rng(1).integers(0, 256, (1, *reference.backend.frame_size, 3), np.uint8)
    expected = reference.infer(frame).anomaly_map
    for variant in variants[1:]:
        if variant.name not in _OTHER_MODELS:
            difference = np.abs(variant.infer(frame).anomaly_map - expected).max()
            variant.map_error = float(difference / np.abs(expected).max())
