"""Frames a second of the paper's two models in PyTorch, for its section 4.4.2: SAAE and DFR, in turns in one process.

Only the compute of one image is timed: pixels on the device at the model's input size to the score map there, batch 1.
Weights are random, which changes no speed. What a deployed graph does is measured by `benchmarks/fps.py`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saae_runtime.errors import SaaeError

from ..config import FitConfig
from ..data.category import Sample
from .timing import measure_together

__all__ = ["LATENT", "measure_fps"]

LATENT = 300
"""V of both models where none is given: about what PCA gives on MVTec AD at 80 %."""
_IMAGES = 4


def measure_fps(
    configs: Mapping[str, FitConfig], samples: Sequence[Sample], device: str | None = None, runs: int = 50
) -> dict[str, Any]:
    """Times the models by turns.

    Each is made by one step of an ordinary fit to a few images, so that it is built as any model is.

    Args:
        configs: by name; `latent` None means `LATENT`.
        samples: normal images; the first few are used.
        device: torch device.
        runs: timed calls each.

    Returns:
        `device`, `threads`, and by name either `fps`, `timing`, `input_size`, `layers`, `backbone`, `latent` or the
        `reason` why the model could not be made.
    """
    import torch

    from ..fitting.features import pick_device

    place = pick_device(device)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="saae-fps-") as cache:
        for name, config in configs.items():
            try:
                calls[name], found[name] = _prepare(config, samples[:_IMAGES], place, Path(cache))
            except SaaeError as error:
                found[name] = {"reason": f"failed: {error.what} {error.why}".strip()}
    timings = measure_together(calls, runs=runs) if calls else {}
    for name, timing in timings.items():
        found[name] |= {"fps": round(timing.per_second, 3), "timing": timing.to_json()}
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine() + " CPU"
    return {"device": name, "threads": torch.get_num_threads(), "models": found}


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
