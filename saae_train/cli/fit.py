"""The model commands of `saae-train`: fit a checkpoint, evaluate a checkpoint or a bundle."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from saae_runtime.errors import DataError
from saae_runtime.files import write_json
from saae_runtime.progress import labelled
from saae_runtime.shell import shell_line
from saae_runtime.terminal import LineCommand, Stages, log

from ..data.category import Category, find_category
from ..data.check import check
from ..data.split import split_for, split_of
from .model import OpenModel, named_images, open_model, thresholds
from .options import Cache, Data, FitOptions, Normal, expand_options

if TYPE_CHECKING:
    from ..config import FitConfig
    from ..model.checkpoint import Checkpoint

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Fit and evaluate models.")


@app.command(cls=LineCommand)
@expand_options
def fit(
    *,
    category: Annotated[
        str | None,
        typer.Option(rich_help_panel="Images", help="Name of the product; with --data also of its folder there."),
    ] = None,
    data: Data = None,
    normal: Normal = None,
    options: FitOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", rich_help_panel="Places", help="Folder of the checkpoint. Default: runs/CATEGORY/checkpoint."
        ),
    ] = None,
    cache: Cache = None,
    precision: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fit a model to images of good parts and save it as a checkpoint.

    Stop it at any time: the same command resumes where it stopped.
    """
    from ..model.checkpoint import check_target, save_checkpoint

    if precision is not None:  # an older name
        options = dataclasses.replace(options, fit_precision=precision)
    config = options.config()
    stages = Stages(log(), 4)
    with stages.stage("check the images") as stage:
        found = named_images(category, data, normal or ()).with_white_level(config.white_level)
        target = check_target(out or Path("runs") / found.name / "checkpoint")
        report = check(found, progress=stage)
        report.raise_if_bad()
        stage.note(f"{len(found.train)} normal images")
    for warning in report.warnings[:5]:
        stages.say(f"  note: {warning}", "yellow")
    fitted = _fit(options, config, found, cache, stages)
    with stages.stage("checkpoint") as stage:
        folder = save_checkpoint(target, fitted)
        stage.note(str(folder))
    images = [word for name in normal or () for word in ("--normal", name)] or ["--data", data or ""]
    following = shell_line("saae-export", "build", "--category", found.name, *images, "--checkpoint", folder)
    log().print(f"Next: {following}", soft_wrap=True, markup=False)


def _fit(options: FitOptions, config: FitConfig, found: Category, cache: Path | None, stages: Stages) -> Checkpoint:
    """The stages from the backbone to the fitted model."""
    from ..fitting.backbone import backbone_for
    from ..fitting.fit import fit as fit_model
    from ..fitting.loop import Reporter

    split = split_for(config, found)
    if split.note:
        stages.say(f"  {split.note}", "yellow")
    with stages.stage("backbone") as stage:
        features = backbone_for(config, split.fitting, options.weights, lambda text: stages.say(text, "yellow"))
        stage.note(features.weights.source)
    with stages.stage("features and fit") as stage:
        return fit_model(
            features,
            split.fitting,
            config,
            found.name,
            device=options.device,
            cache=cache,
            texture=options.texture,
            reporter=Reporter(
                features=labelled(stage, "features"),
                steps=lambda done, total, value: stage(done, total, f"loss {value:.4f}"),
                memory=stage,
                say=lambda text: stages.say(text, "dim"),
            ),
            held_out=split.held_out,
            synthetic=found.synthetic,
        )


@app.command(cls=LineCommand)
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a bundle or a checkpoint.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of categories (MVTec AD layout).", show_default=False)],
    category: Annotated[str | None, typer.Option(help="Name of the category. Default: the model's own.")] = None,
    backend: Annotated[str, typer.Option(help="What runs a bundle: auto, onnxruntime:cpu, tensorrt, ...")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for evaluation.json, the curves (PNG and SVG) and sheet.png."),
    ] = None,
) -> None:
    """Measure a model on the test images of a category: table, JSON, curves and a sheet of examples."""
    from saae_runtime.render import save_png

    from ..charts.files import write_chart
    from ..charts.sheet import qualitative_sheet
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.examples import representatives, sheet_columns

    with ExitStack() as stack:
        opened = open_model(model, backend, stack)
        scorer = opened.scorer
        found = find_category(data, category or opened.category).with_white_level(opened.white_level)
        threshold, image_threshold, source = _thresholds(opened, found)
        with Stages(log(), 1).stage(f"evaluate {found.name}") as stage:
            result = measure(scorer, found, threshold=threshold, image_threshold=image_threshold, progress=stage)
        Console().print(result.table(intervals=True))
        Console().print(f"T: {source}", style="dim", markup=False, highlight=False)
        if out is not None:
            write_json(out / "evaluation.json", result.to_json() | {"threshold_source": source})
            log().print(f"Written: {out}/evaluation.json", soft_wrap=True, markup=False)
            for curve in result.curves:
                stem = out / curve.title.lower().replace(" ", "-")
                svg, png = write_chart(stem, curve.chart(), curve.heading)
                log().print(f"Written: {png}, {svg.name}", soft_wrap=True, markup=False)
            threshold = result.threshold if result.threshold is not None else result.best_f1_threshold
            if threshold is not None:
                columns = sheet_columns(scorer, found, representatives(result))
                save_png(out / "sheet.png", qualitative_sheet(columns, threshold))
                log().print(f"Written: {out}/sheet.png", soft_wrap=True, markup=False)


def _thresholds(model: OpenModel, found: Category) -> tuple[float | None, float | None, str]:
    """Pixel and image T and their origin; None for a checkpoint without unseen images to calibrate on."""
    if model.checkpoint is None:
        return thresholds(model, None, found.name)
    try:
        split = split_of(model.checkpoint.record, model.checkpoint.config, found)
    except DataError as error:
        return None, None, f"none, {error.what} {error.why}".strip()
    with Stages(log(), 1).stage("calibrate T") as stage:
        pixel, image, source = thresholds(model, split, found.name, progress=stage)
    return pixel, image, f"{source}. {split.note}".strip()
