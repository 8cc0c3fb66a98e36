"""The model commands of `saae-train`: fit a checkpoint, evaluate a checkpoint or a bundle."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saae_runtime.errors import DataError
from saae_runtime.files import write_json
from saae_runtime.stages import Stages
from saae_runtime.terminal import log

from ..data.category import Category, find_category, split_held_out
from .model import OpenModel, named_images, open_model, thresholds
from .options import make_config, parse_layers, parse_size

app = typer.Typer(no_args_is_help=True, help="Fit and evaluate models.")


@app.command()
def fit(
    category: Annotated[str | None, typer.Option(help="The category's name.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of categories in the MVTec AD layout.")] = None,
    normal: Annotated[Path | None, typer.Option(help="A plain folder of good pictures instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default runs/<category>/checkpoint.")] = None,
    preset_name: Annotated[str, typer.Option("--preset", help="fast, lite, paper, cae, vgg19 or dfr.")] = "fast",
    model: Annotated[str | None, typer.Option(help="saae, or cae: without its transformer.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Name of a timm ViT, or vgg19.")] = None,
    weights: Annotated[str | None, typer.Option(help="A file, or: cache, hub, packaged.")] = None,
    layers: Annotated[str | None, typer.Option(help="e.g. 3-7 or 0,1,2,3,4; 0 is the patch projection.")] = None,
    input_size: Annotated[
        str | None, typer.Option(help="e.g. 336 or 384x512 (height x width). Default: the backbone's own.")
    ] = None,
    components: Annotated[int | None, typer.Option(min=1, help="Principal components the model works in.")] = None,
    latent: Annotated[int | None, typer.Option(help="V; default by PCA.")] = None,
    saae_patch: Annotated[
        int | None, typer.Option(min=1, help="Patch size of the transformer, in grid positions. Default: 1; vgg19 8.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images instead of steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    loss: Annotated[str | None, typer.Option(help="l2 (paper) or cosine.")] = None,
    score: Annotated[str | None, typer.Option(help="l2 (paper), cosine or joint (needs components).")] = None,
    smoothing: Annotated[
        float | None, typer.Option(min=0.0, help="Deviation of the Gaussian over the map, in patches.")
    ] = None,
    fit_precision: Annotated[
        str | None, typer.Option("--fit-precision", "--precision", help="Of fitting: auto, bf16, tf32 or fp32.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and split.")] = None,
    texture: Annotated[bool | None, typer.Option("--texture/--object", help="MLP size V or 2V; by name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    cache: Annotated[Path | None, typer.Option(help="Feature cache. Default: $SAAE_CACHE or ~/.cache/saae.")] = None,
) -> None:
    """Fit a model to good pictures. A stopped run goes on where it stopped when the same command is given again."""
    from ..data.check import check
    from ..fitting.fit import Reporter
    from ..fitting.fit import fit as fit_model
    from ..model.checkpoint import check_target, save_checkpoint
    from ..model.vit import build_backbone, choose_layers
    from ..model.weights import refuse_random

    config = make_config(
        preset_name,
        model,
        backbone=backbone,
        layers=parse_layers(layers),
        input_size=parse_size(input_size),
        components=components,
        latent=latent,
        saae_patch=saae_patch,
        loss=loss,
        score=score,
        smoothing=smoothing,
        steps=steps,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        precision=fit_precision,
        seed=seed,
    )
    stages = Stages(log(), 4)
    with stages.stage("check the images") as stage:
        found = named_images(category, data, normal)
        target = check_target(out or Path("runs") / found.name / "checkpoint")
        check(found, progress=stage).raise_if_bad()
        stage.note(f"{len(found.train)} normal images")
    if config.layers is None:
        chosen, measured = choose_layers(config.backbone)
        config = config.replace(layers=chosen)
        if not measured:
            stages.say(f"No measured layers for {config.backbone}: taking its middle third, {chosen}", "yellow")
    samples, held_out = split_held_out(found.train, fraction=config.held_out, seed=config.seed)
    with stages.stage("backbone") as stage:
        features = build_backbone(config.backbone, config.layers or (), config.input_size, weights)
        refuse_random(features.weights.source, features.name)
        stage.note(features.weights.source)
    with stages.stage("features and fit") as stage:
        reporter = Reporter(
            features=lambda done, total: stage(done, total, "features"),
            steps=lambda done, total, value: stage(done, total, f"loss {value:.4f}"),
            say=lambda text: stages.say(text, "dim"),
        )
        fitted = fit_model(
            features,
            samples,
            config,
            found.name,
            device=device,
            cache=cache,
            texture=texture,
            reporter=reporter,
            facts={"held_out": sorted(sample.path.name for sample in held_out), "synthetic": found.synthetic},
        )
    with stages.stage("checkpoint") as stage:
        folder = save_checkpoint(target, fitted)
        stage.note(str(folder))
    source = ["--normal", str(normal)] if normal is not None else ["--data", str(data)]
    following = ["saae-export", "build", "--category", found.name, *source, "--checkpoint", str(folder)]
    log().print(f"Next: {shlex.join(following)}", soft_wrap=True, markup=False)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A bundle or a checkpoint folder.")],
    data: Annotated[Path, typer.Option(help="Folder of categories in the MVTec AD layout.")],
    category: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    backend: Annotated[str, typer.Option(help="Of a bundle: auto, onnxruntime:cpu, tensorrt ...")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json, the curves as PNG and SVG, and sheet.png."),
    ] = None,
) -> None:
    """Measure a model on a category's test images: table, JSON, curves and a sheet of examples."""
    from saae_runtime.render import save_png

    from ..charts.files import write_chart
    from ..evaluation.curves import qualitative_sheet
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.evaluate import representatives, shown

    with ExitStack() as stack:
        opened = open_model(model, backend, stack)
        scorer = opened.scorer
        found = find_category(data, category or opened.category)
        threshold, image_threshold, source = _thresholds(opened, found)
        result = measure(scorer, found, threshold=threshold, image_threshold=image_threshold)
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
                sheet = qualitative_sheet(shown(scorer, found, representatives(result)), threshold)
                save_png(out / "sheet.png", sheet)
                log().print(f"Written: {out}/sheet.png", soft_wrap=True, markup=False)


def _thresholds(model: OpenModel, found: Category) -> tuple[float | None, float | None, str]:
    """Pixel and image T, and where they are from; none for a checkpoint without images that it has not seen."""
    if model.checkpoint is None:
        return thresholds(model, None, found.name)
    from ..data.unseen import unseen_images

    try:
        unseen = unseen_images(model.checkpoint.facts, model.checkpoint.config, found)
    except DataError as error:
        return None, None, f"none, {error.what} {error.why}".strip()
    with Stages(log(), 1).stage("calibrate T") as stage:
        pixel, image, source = thresholds(model, unseen, found.name, progress=stage)
    return pixel, image, f"{source}. {unseen.note}".strip()
