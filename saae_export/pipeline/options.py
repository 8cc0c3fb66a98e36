"""The options of a build, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from saae_runtime.backends.openvino import bf16_missing
from saae_runtime.errors import ConfigError
from saae_train.calibrate import check_default_rate
from saae_train.config import FitConfig, preset
from saae_train.selftest.run import DEFAULT_FRAMES

from ..graph.half_weights import require_blocks
from .images import Request

__all__ = ["BuildOptions", "FitRequest", "check_options", "parse_frame_size"]

_ENGINES = ("auto", "none", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class FitRequest:
    """The options of a build's fit; the attributes are those of `BuildOptions`."""

    config: FitConfig
    checkpoint: Path | None
    refit: bool
    weights: str | None
    texture: bool | None
    device: str | None
    cache: Path | None
    half_weights: bool
    int8: bool


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build.

    Attributes:
        request: where the images are.
        out: the bundle's folder; None: bundles/<category>.
        work: folder of fitted models and drawn images, kept between runs.
        config: how to fit.
        checkpoint: a fitted model to take instead of fitting one.
        refit: fit again even if there is a model of the same images and configuration.
        weights: backbone weights, see `saae_train.model.weights.load_state_dict`.
        texture: whether the product is a texture (MLP size, default pixel FPR); None: what the given checkpoint was
            fitted as, or by its name.
        device: torch device for fitting.
        frame_size: `auto`, `model` or HEIGHTxWIDTH.
        precisions: graphs to export, `fp32` first.
        half_weights: store the FP32 graph's large weights in FP16; it still computes in FP32.
        int8: add an INT8 graph, if it passes its quality gate.
        engines: `auto` (for what this machine has), `none`, or libraries (`tensorrt`, `tensorrt-rtx`).
        pixel_fpr: default acceptable pixel FPR; None: 0.001, and without a memory the paper's 0 for textures.
        image_fpr: default acceptable share of normal images called anomalous; None: 0.05 with a memory, else 0.
        exclude: names or patterns of normal images to leave out.
        keep: names or patterns of normal images that are good although they look unlike the others.
        parity_images: images that every artefact is compared on.
        samples: frames kept in the bundle with PyTorch's results, for `verify` on other machines; 0 keeps none.
        measure_latency: whether to time the backends.
        self_test: whether to draw simulated defects onto held-out images and count what is found.
        self_test_frames: how many.
        allow_blind: write the bundle even if the model misses large, strong simulated defects.
        select: configurations to choose from by simulated defects, see `saae_export.pipeline.select.choices_of`; empty:
            `config` is taken.
        cache: feature cache; None: the user's.
    """

    request: Request
    out: Path | None = None
    work: Path = Path("runs")
    config: FitConfig = field(default_factory=lambda: preset("fast"))
    checkpoint: Path | None = None
    refit: bool = False
    weights: str | None = None
    texture: bool | None = None
    device: str | None = None
    frame_size: str = "auto"
    precisions: tuple[str, ...] = ("fp32", "fp16")
    half_weights: bool = False
    int8: bool = False
    engines: tuple[str, ...] = ("auto",)
    pixel_fpr: float | None = None
    image_fpr: float | None = None
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    parity_images: int = 8
    samples: int = 4
    measure_latency: bool = True
    self_test: bool = True
    self_test_frames: int = DEFAULT_FRAMES
    allow_blind: bool = False
    select: tuple[str, ...] = ()
    cache: Path | None = None

    @property
    def fit(self) -> FitRequest:
        """The options of the fit."""
        return FitRequest(**{item.name: getattr(self, item.name) for item in fields(FitRequest)})


def check_options(options: BuildOptions) -> None:
    """Check the options before the work.

    Raises:
        ConfigError: options that exclude each other, or that this machine cannot serve.
    """
    known = ("fp32", "fp16", "bf16")
    wrong = [name for name in options.precisions if name not in known]
    if wrong or not options.precisions:
        raise ConfigError(
            f"A bundle cannot be built as {', '.join(wrong) or 'nothing'}.", "", f"--precision {','.join(known)}"
        )
    if "bf16" in options.precisions:
        why = bf16_missing()
        if why or "fp32" not in options.precisions:
            raise ConfigError(
                "bf16 cannot be calibrated here.",
                why or "It is the FP32 graph, computed in bf16.",
                "pip install 'saae[openvino]' on a processor with bf16, or leave bf16 out" if why else "add fp32",
            )
    if options.int8 and "fp32" not in options.precisions:
        raise ConfigError("INT8 is made from the FP32 graph, which is not built.", "", "add it: --precision fp32")
    if options.half_weights and "fp32" not in options.precisions:
        raise ConfigError("--half-weights is for the FP32 graph, which is not built.", "", "add it: --precision fp32")
    if options.select and options.checkpoint is not None:
        raise ConfigError("--select and --checkpoint exclude each other.", "A given model is taken.", "leave one out")
    if options.half_weights and options.checkpoint is None:
        require_blocks(options.config.backbone, options.config.layers)
    if options.parity_images < 1:
        raise ConfigError("Parity needs at least one image.", "It is the gate of a build.", "--parity-images 8")
    if options.self_test and options.self_test_frames < 1:
        raise ConfigError("A self-test needs at least one frame.", "", "--selftest-frames 60, or --no-selftest")
    check_default_rate(options.pixel_fpr, "--fpr")
    check_default_rate(options.image_fpr, "--image-fpr")
    strange = [name for name in options.engines if name.replace("_", "-") not in _ENGINES]
    if strange:
        raise ConfigError(f"There is no engine {', '.join(strange)}.", "", f"--engine, of: {', '.join(_ENGINES)}")
    parse_frame_size(options.frame_size, None)


def parse_frame_size(text: str, shared: tuple[int, int] | None) -> tuple[int, int] | None:
    """The frame size to bake into the graph; None: the model's.

    Args:
        text: `auto` (the images' own size where all share one), `model`, or HEIGHTxWIDTH.
        shared: the size that all images share, or None.

    Raises:
        ConfigError: none of these.
    """
    if text == "auto":
        return shared
    if text == "model":
        return None
    parts = text.lower().split("x")
    if len(parts) == 2 and all(part.isdecimal() and 1 <= int(part) <= 16384 for part in parts):
        return int(parts[0]), int(parts[1])
    raise ConfigError(
        f"--frame-size {text} is not a size.",
        "It is the camera's frame, height first.",
        "--frame-size 1024x1280, or auto, or model",
    )
