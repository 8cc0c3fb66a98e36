"""The command `saae-export build`: parse, call one function, print."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saae_runtime.errors import ConfigError
from saae_runtime.terminal import log
from saae_train.cli.options import Cache, FitOptions, Normal, expand_options, parse_share

from .needs import need_export

if TYPE_CHECKING:
    from ..pipeline.images import Request

__all__ = ["build_command"]

_image = functools.partial(typer.Option, rich_help_panel="Images")
_export = functools.partial(typer.Option, rich_help_panel="Export")
_gate = functools.partial(typer.Option, rich_help_panel="Gates")
_place = functools.partial(typer.Option, rich_help_panel="Places")


@dataclass(frozen=True)
class ImageOptions:
    """Where the images are, see `saae_export.pipeline.images.Request`."""

    category: Annotated[
        str | None,
        _image("--category", "-c", help="Name of the product, e.g. zipper; with --data also of its folder there."),
    ] = None
    data: Annotated[
        Path | None,
        _image("--data", help="Folder of categories (MVTec AD layout). Default: $SAAE_DATA, ./data, the demo images."),
    ] = None
    normal: Normal = None
    normal_test: Annotated[
        list[Path] | None,
        _image(
            "--normal-test",
            metavar="FOLDER",
            help="With --normal: folder of further good parts, to test on. May be repeated.",
        ),
    ] = None
    abnormal: Annotated[
        list[Path] | None,
        _image(
            "--abnormal",
            metavar="FOLDER",
            help="With --normal: folder of defective parts, to test on. May be repeated.",
        ),
    ] = None
    masks: Annotated[
        list[Path] | None,
        _image(
            "--masks",
            metavar="FOLDER",
            help="Folder of the masks of --abnormal; repeated as often and in the same order.",
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        _image("--exclude", metavar="NAME", help="Normal image to leave out; a name or a pattern. May be repeated."),
    ] = None
    keep: Annotated[
        list[str] | None,
        _image(
            "--keep",
            metavar="NAME",
            help="Normal image that is good although it looks unlike the others. May be repeated.",
        ),
    ] = None
    demo: Annotated[bool, _image("--demo", help="Use the drawn demo images, whatever else is there.")] = False

    def request(self) -> Request:
        """The request for the pipeline."""
        from ..pipeline.images import Request

        return Request(
            self.category,
            self.data,
            tuple(self.normal or ()),
            tuple(self.abnormal or ()),
            tuple(self.masks or ()),
            tuple(self.normal_test or ()),
            self.demo,
        )


@dataclass(frozen=True)
class ExportOptions:
    """What goes into the bundle."""

    precision: Annotated[str, _export("--precision", metavar="X[,Y]", help="Graphs to export: fp32, fp16, bf16.")] = (
        "fp32,fp16"
    )
    int8: Annotated[bool, _export("--int8", help="Add an INT8 graph if it passes its quality gate. Takes minutes.")] = (
        False
    )
    half_weights: Annotated[
        bool, _export("--half-weights", help="Store the weights of the FP32 graph in FP16: half the file size.")
    ] = False
    frame_size: Annotated[
        str,
        _export(
            "--frame-size",
            help="Size of the camera's frames, HEIGHTxWIDTH; auto: that of the images; model: the model's input.",
        ),
    ] = "auto"
    engine: Annotated[
        str, _export("--engine", metavar="X[,Y]", help="TensorRT engines: auto, none, tensorrt, tensorrt-rtx.")
    ] = "auto"
    samples: Annotated[
        int, _export("--samples", min=0, metavar="N", help="Frames kept in the bundle, to verify it on other machines.")
    ] = 4
    latency: Annotated[
        bool, _export("--latency/--no-latency", help="Measure the latency of the backends that work here.")
    ] = True

    def precisions(self) -> tuple[str, ...]:
        """Each precision once, FP32 first, then FP16."""
        order = {"fp32": 0, "fp16": 1}
        return tuple(sorted(_words(self.precision), key=lambda name: order.get(name, 2)))


@dataclass(frozen=True)
class GateOptions:
    """Thresholds, and what a bundle must pass."""

    fpr: Annotated[
        float | None,
        _gate(
            "--fpr",
            help="Acceptable false-positive rate of pixels. Default: 0.001; textures without a memory: 0 (paper).",
        ),
    ] = None
    false_alarms: Annotated[
        str | None,
        _gate(
            "--false-alarms",
            "--image-fpr",
            metavar="SHARE",
            help="Acceptable share of good parts rejected: 5/1000, 0.5% or 0.005. Default: 5%; without a memory 0.",
        ),
    ] = None
    parity_images: Annotated[
        int, _gate("--parity-images", help="Images on which every graph is compared with PyTorch.")
    ] = 8
    selftest: Annotated[
        bool,
        _gate("--selftest/--no-selftest", help="Draw SIMULATED defects onto good images and count those found."),
    ] = True
    selftest_frames: Annotated[int, _gate("--selftest-frames", help="Number of images with a simulated defect.")] = 60
    allow_blind: Annotated[
        bool, _gate("--allow-blind", help="Build even if large, strong simulated defects are missed.")
    ] = False


@expand_options
def build_command(
    *,
    images: ImageOptions,
    fit: FitOptions,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            rich_help_panel="Fit",
            help="Folder of a fitted model to take as it is, from saae-train fit.",
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", rich_help_panel="Fit", help="Fit again even if this model was fitted before.")
    ] = False,
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            rich_help_panel="Fit",
            metavar="auto|X[,Y]",
            help="Fit other configurations, too (fewer pixels, lite, small, joint; auto: all that are possible), and "
            "take the one that tells SIMULATED defects best from good images. Takes as many more fits.",
        ),
    ] = None,
    export: ExportOptions,
    gates: GateOptions,
    out: Annotated[Path | None, _place("--out", "-o", help="Folder of the bundle. Default: bundles/CATEGORY.")] = None,
    work: Annotated[Path, _place("--work", help="Folder of fitted models and drawn images.")] = Path("runs"),
    cache: Cache = None,
) -> None:
    """Build a bundle from images of good parts: fit, export, calibrate, compile, compare, evaluate, report.

    Stop it at any time: the same command resumes, and reuses what is done.
    """
    need_export()
    from ..pipeline.build import BuildOptions, build
    from ..pipeline.select import choices_of
    from ..pipeline.summary import print_summary

    if checkpoint is not None:
        _refuse_ignored(checkpoint, fit, refit)
    console = log()
    result = build(
        BuildOptions(
            request=images.request(),
            out=out,
            work=work,
            config=fit.config(),
            checkpoint=checkpoint,
            refit=refit,
            weights=fit.weights,
            texture=fit.texture,
            device=fit.device,
            frame_size=export.frame_size,
            precisions=export.precisions(),
            half_weights=export.half_weights,
            int8=export.int8,
            engines=_words(export.engine),
            pixel_fpr=gates.fpr,
            image_fpr=parse_share(gates.false_alarms, "--false-alarms"),
            exclude=tuple(images.exclude or ()),
            keep=tuple(images.keep or ()),
            parity_images=gates.parity_images,
            samples=export.samples,
            measure_latency=export.latency,
            self_test=gates.selftest,
            self_test_frames=gates.selftest_frames,
            allow_blind=gates.allow_blind,
            select=choices_of(select),
            cache=cache,
        ),
        console,
    )
    print_summary(result, console)
    print(result.where)


def _refuse_ignored(checkpoint: Path, fit: FitOptions, refit: bool) -> None:
    """Refuse options that say how to fit beside a fitted model. Raises ConfigError, or CheckpointError for no model."""
    from saae_train.model.checkpoint import read_fit_config

    used = {"--white-level"}  # it is compared with the model's
    if read_fit_config(checkpoint).memory is None:
        used.add("--texture/--object")  # the default pixel FPR
    ignored = [name for name in [*fit.given(), *(["--refit"] if refit else [])] if name not in used]
    if ignored:
        raise ConfigError(
            f"{', '.join(ignored)} and --checkpoint exclude each other.",
            "That model is fitted already, and is taken as it is.",
            "leave one out",
        )


def _words(text: str) -> tuple[str, ...]:
    """The words between commas, without repeats."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
