"""The command `saae-export`, all of it thin: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saae_runtime.bundle import Bundle, open_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.terminal import command_group, log, run_command

from .calibrate import calibrate_command
from .engine import add_commands

__all__ = ["app", "main"]

app = command_group("From a folder of good pictures to a verified bundle, and what belongs to it.")
add_commands(app)
app.command("calibrate")(calibrate_command)


@app.command()
def build(
    category: Annotated[
        str | None, typer.Option("--category", "-c", help="The product, e.g. zipper; a folder's name in --data.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of categories (MVTec AD tree). Default: $SAAE_DATA, ./data, the drawn demo images."),
    ] = None,
    normal: Annotated[Path | None, typer.Option(help="Instead of --data: folder of normal images.")] = None,
    abnormal: Annotated[Path | None, typer.Option(help="With --normal: folder of defective images.")] = None,
    masks: Annotated[Path | None, typer.Option(help="With --abnormal: folder of their masks.")] = None,
    normal_test: Annotated[Path | None, typer.Option(help="With --normal: more normal images, to test on.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The drawn demo images, whatever else is there.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The bundle's folder. Default: bundles/CATEGORY.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="fast, lite (small), paper (700 epochs), or its cae, vgg19, dfr.")
    ] = "fast",
    model: Annotated[str | None, typer.Option(help="saae, or cae: without its transformer. Default: saae.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm ViT by name, or vgg19. Default: the preset's.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Backbone weights: a file, or cache, hub, packaged. Default: the first there.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="e.g. 3-7 or 0,1,2,3,4; 0 is the patch projection.")] = None,
    input_size: Annotated[
        str | None, typer.Option(help="e.g. 336 or 384x512 (height x width). Default: the backbone's own.")
    ] = None,
    components: Annotated[int | None, typer.Option(min=1, help="Principal components the model works in.")] = None,
    latent: Annotated[int | None, typer.Option(min=3, help="Latent width V. Default: 80 % of the variance.")] = None,
    saae_patch: Annotated[
        int | None,
        typer.Option(min=1, help="Patch size of the transformer, in grid positions. Default: 1; vgg19 8."),
    ] = None,
    loss: Annotated[str | None, typer.Option(help="l2 (paper) or cosine.")] = None,
    score: Annotated[str | None, typer.Option(help="l2 (paper), cosine or joint (needs components).")] = None,
    smoothing: Annotated[
        float | None, typer.Option(min=0.0, help="Deviation of the Gaussian over the map, in patches.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images instead of steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and split.")] = None,
    fit_precision: Annotated[str | None, typer.Option(help="Of fitting: auto, bf16, tf32 or fp32.")] = None,
    texture: Annotated[
        bool | None,
        typer.Option("--texture/--object", help="MLP V or 2V, FPR 0 or 0.001. Default: the checkpoint's, or by name."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="For fitting: cpu, cuda, cuda:1.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Take this fitted model instead of fitting.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit again even where the same model is there.")] = False,
    frame_size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH of the camera, baked in; auto: the images' own; model: the model's.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16.")] = "fp32,fp16",
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store the FP32 graph's weights in FP16: half the file.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Add an INT8 graph, if it passes its quality gate. Takes minutes.")
    ] = False,
    engine: Annotated[str, typer.Option(help="auto, none, tensorrt, tensorrt-rtx.")] = "auto",
    fpr: Annotated[
        float | None, typer.Option(help="Default acceptable pixel FPR. Default: 0.001; textures 0 (paper).")
    ] = None,
    image_fpr: Annotated[float, typer.Option(help="Default acceptable share of normal images rejected.")] = 0.0,
    parity_images: Annotated[int, typer.Option(min=1, help="Images that every artefact is compared on.")] = 8,
    samples: Annotated[
        int, typer.Option(min=0, help="Frames kept in the bundle, for `verify` on other machines; 0 for none.")
    ] = 4,
    latency: Annotated[bool, typer.Option(help="Time the backends that are here.")] = True,
    selftest: Annotated[
        bool, typer.Option(help="Draw SIMULATED defects onto held-out images and count what the model finds.")
    ] = True,
    selftest_frames: Annotated[int, typer.Option(min=1, help="How many simulated defects.")] = 60,
    allow_blind: Annotated[
        bool, typer.Option("--allow-blind", help="Build even where large, strong simulated defects are missed.")
    ] = False,
    work: Annotated[Path, typer.Option(help="Where fitted models and drawn images are kept.")] = Path("runs"),
    cache: Annotated[Path | None, typer.Option(help="Feature cache. Default: $SAAE_CACHE or ~/.cache/saae.")] = None,
) -> None:
    """Build a bundle: find, check, fit, export, calibrate, compile, compare, evaluate, report.

    Stop it at any time and give the same command again: what was done is reused.
    """
    _need_export()
    from saae_train.cli.options import make_config, parse_layers, parse_size

    from ..pipeline.build import BuildOptions
    from ..pipeline.build import build as run
    from ..pipeline.images import Request

    config = make_config(
        preset,
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
    console = log()
    result = run(
        BuildOptions(
            request=Request(category, data, normal, abnormal, masks, normal_test, demo),
            out=out,
            work=work,
            config=config,
            checkpoint=checkpoint,
            refit=refit,
            weights=weights,
            texture=texture,
            device=device,
            frame_size=frame_size,
            precisions=_precisions(precision),
            half_weights=half_weights,
            int8=int8,
            engines=tuple(name.strip() for name in engine.split(",") if name.strip()),
            pixel_fpr=fpr,
            image_fpr=image_fpr,
            parity_images=parity_images,
            samples=samples,
            measure_latency=latency,
            self_test=selftest,
            self_test_frames=selftest_frames,
            allow_blind=allow_blind,
            cache=cache,
        ),
        console,
    )
    from ..pipeline.summary import print_summary

    print_summary(result, console)
    print(result.where)


@app.command()
def onnx(
    checkpoint: Annotated[Path, typer.Argument(help="The fitted model's folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("model.onnx"),
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    frame_size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the camera, or model.")] = "model",
    threshold: Annotated[float, typer.Option(help="Default pixel threshold T; the graph's input overrides it.")] = 1.0,
) -> None:
    """Export a fitted model as one ONNX file, without calibration or bundle."""
    _need_export()
    from saae_train.model.checkpoint import load_checkpoint

    from ..graph.fused import FusedGraph
    from ..graph.onnx_file import export_onnx
    from ..pipeline.bundle import parse_frame_size

    if frame_size == "auto":
        raise ConfigError(
            "--frame-size auto needs images.", "Only `build` has them.", "--frame-size model or 1024x1280"
        )
    found = load_checkpoint(checkpoint)
    graph = FusedGraph(found.detector, parse_frame_size(frame_size, None), precision)
    export_onnx(graph, out, threshold, {"saae.category": found.category})
    log().print(f"{out}: {precision}, frame {graph.frame_size[0]} x {graph.frame_size[1]}, checked")
    print(out)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Images to compare on. Default: the bundle's own frames.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The fitted model, to compare with PyTorch here and now.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Only this backend. Default: all that work here.")] = None,
    diagnose: Annotated[bool, typer.Option("--diagnose", help="Name the first node where FP16 leaves FP32.")] = False,
) -> None:
    """Check a bundle's hashes, and every artefact that runs here against its reference. Exit code 3: parity failed."""
    from ..parity.compare import parity_table, require
    from ..parity.verify import verify as run

    console = log()
    with console.status("opening") as status:
        found = run(bundle, data=data, checkpoint=checkpoint, backend=backend, note=status.update)
    for item in found.skipped:
        console.print(f"not run: {escape(item.name)}: {escape(item.why)}")
    Console(highlight=False).print(parity_table(found.reports))
    if diagnose:
        _diagnose(found.bundle, console)
    for name in found.recorded:
        console.print(f"{escape(name)}: this comparison is in the manifest now")
    require(found.reports, "rebuild the bundle; --diagnose names the first node where FP16 leaves FP32")
    console.print(
        f"[green]verified[/green]: {len(found.bundle.manifest.files)} files, {len(found.reports)} comparisons"
    )


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as JSON on standard output.")] = False,
    check: Annotated[bool, typer.Option(help="Compare hashes first.")] = True,
) -> None:
    """Print what a bundle is: model, frame, thresholds, artefacts, parity, files."""
    from .inspect import print_bundle

    opened = open_bundle(bundle, verify=check)
    if as_json:
        print(json.dumps(opened.manifest.to_json(), indent=2))
        return
    print_bundle(opened, Console(highlight=False))


def main() -> None:
    """Entry point."""
    run_command(app, "saae-export")


def _diagnose(bundle: Bundle, console: Console) -> None:
    _need_export()
    from ..parity.compare import BOUNDS
    from ..parity.nodes import compare_nodes
    from ..parity.reference import read_reference

    files = {item.precision: bundle.file(item.file) for item in bundle.artefacts(kind="onnx")}
    stored, _ = read_reference(bundle)
    if not {"fp32", "fp16"} <= set(files) or not stored:
        raise ConfigError(
            "There is nothing to diagnose.", "It takes an FP32 graph, an FP16 graph and a reference frame.", ""
        )
    rows = compare_nodes(files["fp32"], files["fp16"], stored[0].frame)
    bound = BOUNDS["fp16"].map
    first = next((row for row in rows if not row.error <= bound), None)
    table = Table(title=f"FP16 against FP32, node by node ({stored[0].name})", title_justify="left")
    for heading in ("node", "error", "largest value"):
        table.add_column(heading, overflow="fold")
    for row in sorted(rows, key=lambda row: -row.error)[:10]:
        table.add_row(row.node, f"{row.error:.1e}", f"{row.largest:.4g}")
    console.print(table)
    if first is None:
        console.print(f"No node leaves the bound of {bound:g}.")
    else:
        console.print(f"First node beyond {bound:g}: [bold]{escape(first.node)}[/bold], error {first.error:.1e}")


def _need_export() -> None:
    """Says what to install, instead of a missing module's name, where only the runtime is there."""
    missing = []
    for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"This command needs {', '.join(missing)}.",
            "Only the runtime is installed here.",
            "pip install 'saae[export]', or 'saae[demo]' with weights that need no network",
        )


def _precisions(text: str) -> tuple[str, ...]:
    order = {"fp32": 0, "fp16": 1}
    names = dict.fromkeys(part.strip() for part in text.split(",") if part.strip())
    return tuple(sorted(names, key=lambda name: order.get(name, 2)))


if __name__ == "__main__":
    main()
