"""Frames per second of SAAE and DFR in PyTorch (the paper's section 4.4.2), timed interleaved in one process.

Only the computation is timed, at batch 1: from pixels on the device, at the model's input size, to the score map there.
Both compute in float32 throughout: on an NVIDIA GPU, TF32 is off, which PyTorch takes for convolutions (all of VGG19)
unless told not to. Weights are random, which does not change the speed. `benchmarks/fps.py` times exported graphs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saae_runtime.errors import SaaeError

from ..config import FitConfig
from ..data.category import Sample
from .timing import Timing, Turn, interleaved, timed_calls

__all__ = ["LATENT", "measure_fps"]

LATENT = 300
"""V of both models if none is given: about what PCA gives on MVTec AD at 80 %."""
_IMAGES = 4


def measure_fps(
    configs: Mapping[str, FitConfig], samples: Sequence[Sample], device: str | None = None, seconds: float = 20.0
) -> dict[str, Any]:
    """Time the models interleaved.

    Each model comes from an ordinary fit of one step to a few images.

    Args:
        configs: by name; `latent` None means `LATENT`.
        samples: normal images; the first few are used.
        device: torch device.
        seconds: time for each model.

    Returns:
        `device`, `threads`, `arithmetic` (of the products) and `models`: by name either `fps`, `timing`, `input_size`,
        `layers`, `backbone` and `latent`, or the `reason` why the model could not be made.
    """
    import torch

    from ..fitting.features import pick_device
    from ..fitting.precision import matmul_precision, reached

    place = pick_device(device)
    turns: dict[str, Turn] = {}
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="saae-fps-") as cache:
        for name, config in configs.items():
            try:
                call, found[name] = _prepare(config, samples[:_IMAGES], place, Path(cache))
                turns[name] = partial(timed_calls, call)
            except SaaeError as error:
                found[name] = {"reason": f"failed: {error.what} {error.why}".strip()}
    with matmul_precision("fp32", place):
        arithmetic = reached(place, convolutions=True)
        timed = interleaved(turns, seconds)
    for name, times in timed.items():
        timing = Timing.of(times)
        found[name] |= {"fps": round(timing.per_second, 3), "timing": timing.to_json()}
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine() + " CPU"
    return {"device": name, "threads": torch.get_num_threads(), "arithmetic": arithmetic, "models": found}


def _prepare(
    config: FitConfig, samples: Sequence[Sample], place: Any, cache: Path
) -> tuple[Callable[[], object], dict[str, Any]]:
    import torch

    from ..fitting.fit import fit
    from ..model.vit import build_backbone, choose_layers

    config = config.replace(steps=1, batch=min(2, len(samples)), latent=config.latent or LATENT)
    layers = config.layers or choose_layers(config.backbone)[0]
    backbone = build_backbone(config.backbone, layers, config.input_size, "random")
    fitted = fit(backbone, samples, config, "speed", device=str(place), cache=cache)
    detector = fitted.detector.to(place)
    pixels = torch.randint(0, 256, (1, 3, *detector.backbone.input_size), dtype=torch.uint8, device=place)

    def call() -> None:
        with torch.inference_mode():
            detector(pixels)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    about = {
        "backbone": config.backbone,
        "layers": list(detector.backbone.layers),
        "input_size": list(detector.backbone.input_size),
        "latent": config.latent,
        "weights": "random",
    }
    return call, about
