"""`saae-train selftest`: how many simulated defects a bundle or a checkpoint finds. Parses, calls and prints."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from saae_runtime.errors import ConfigError, DataError
from saae_runtime.files import write_json
from saae_runtime.terminal import LineCommand, Stages, log

from .model import OpenModel, named_images, open_model, thresholds

if TYPE_CHECKING:
    from ..data.category import Category
    from ..data.split import Split

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Try a model without defect images.")


@app.command(cls=LineCommand)
def selftest(
    model: Annotated[Path, typer.Argument(help="Folder of a bundle or a checkpoint.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Folder of categories (MVTec AD layout).")] = None,
    normal: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder of images of good parts, in place of --data. May be repeated."),
    ] = None,
    category: Annotated[str | None, typer.Option(help="Name of the category. Default: the model's own.")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="X[,Y]", help="Some of cut-paste, scratch, texture, missing part, spot, blur. Default: all."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images with a simulated defect.")] = 60,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of the places, shapes and colours of the defects.")
    ] = 0,
    fpr: Annotated[
        float | None,
        typer.Option(help="Acceptable false-positive rate of pixels. Default: the bundle's, or the paper's."),
    ] = None,
    image_fpr: Annotated[
        float | None, typer.Option(help="Acceptable share of good parts rejected. Default: the bundle's, or 0.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs a bundle: auto, onnxruntime:cpu, tensorrt, ...")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for selftest.json, chart.png and sheet.png.")
    ] = None,
) -> None:
    """Draw simulated defects onto images of good parts and count how many a model finds, by kind, size and contrast.

    An estimate if there are no images of defects. Real ones may be harder to find.
    """
    from saae_runtime.render import save_png

    from ..charts.sheet import qualitative_sheet
    from ..selftest.chart import chart
    from ..selftest.run import check_request, draw_examples
    from ..selftest.run import selftest as run
    from ..selftest.simulate import KINDS

    chosen = KINDS if kinds is None else tuple(part.strip() for part in kinds.split(",") if part.strip())
    check_request(frames, chosen)
    stages = Stages(log(), 3)
    with ExitStack() as stack:
        with stages.stage("model and images") as stage:
            opened = open_model(model, backend, stack)
            scorer = opened.scorer
            found = named_images(category or opened.category, data, normal or ())
            found = found.with_white_level(opened.white_level)
            split = _split(opened, found)
            stage.note(f"{len(split.normal)} normal images")
        if split.note:
            stages.say(f"  {split.note}", "yellow")
        with stages.stage("thresholds") as stage:
            threshold, image_threshold, source = thresholds(opened, split, found.name, fpr, image_fpr, stage)
            stage.note(source)
        with stages.stage("simulated defects") as stage:
            result = run(
                scorer,
                split.normal,
                threshold=threshold,
                image_threshold=image_threshold,
                kinds=chosen,
                frames=frames,
                seed=seed,
                synthetic=found.synthetic,
                progress=stage,
            )
            stage.note(f"{len(result.defects)} drawn, {result.balanced_text()} found")
        Console().print(result.table())
        if out is not None:
            write_json(out / "selftest.json", result.to_json())
            save_png(out / "chart.png", chart(result))
            columns = [column for _, column in draw_examples(scorer, split.normal, result)]
            save_png(out / "sheet.png", qualitative_sheet(columns, result.threshold))
            log().print(f"Written: {out}/selftest.json, chart.png, sheet.png", soft_wrap=True, markup=False)


def _split(model: OpenModel, found: Category) -> Split:
    """Images that the model was not fitted on; for a bundle, those that it was calibrated on."""
    from ..config import FitConfig
    from ..data.split import Split, content_digest, split_for, split_of

    if model.checkpoint is not None:
        return split_of(model.checkpoint.record, model.checkpoint.config, found)
    assert model.engine is not None
    manifest = model.engine.manifest
    with suppress(ConfigError, DataError):  # a bundle of a different version, or a few other images
        split = split_for(FitConfig.from_json(manifest.model.config), found)
        if content_digest(split.normal) == manifest.calibration.digest:
            return replace(split, unseen=manifest.calibration.held_out is True)
    return Split(
        (),
        found.train,
        False,
        "These are not the images that the bundle was built from: all of them are taken. Where it was fitted on some, "
        "the numbers flatter it.",
    )
