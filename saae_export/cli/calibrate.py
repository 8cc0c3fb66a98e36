"""The command `saae-export calibrate`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saae_runtime.terminal import log

if TYPE_CHECKING:
    from ..calibrate.recalibrate import Change

__all__ = ["calibrate_command"]


def calibrate_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    normal: Annotated[
        list[str],
        typer.Option(
            "--normal",
            metavar="IMAGES",
            help="New images of good parts: a file, a folder or a quoted pattern. May be repeated.",
            show_default=False,
        ),
    ],
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="IMAGE", help="Path of an image among them to leave out. May be repeated."),
    ] = None,
    pixel_fpr: Annotated[
        float | None, typer.Option(help="Acceptable false-positive rate of pixels. Default: the bundle's.")
    ] = None,
    image_fpr: Annotated[
        float | None, typer.Option(help="Acceptable share of good parts rejected. Default: the bundle's.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="X[,Y]", help="Keep only these precisions; the others are REMOVED. Default: all."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a new bundle here; BUNDLE stays as it is.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the old and new thresholds, and write nothing.")
    ] = False,
) -> None:
    """Calibrate the thresholds of a bundle again, on new images of good parts.

    For a new lamp, lens or camera. Nothing is fitted; neither PyTorch nor onnx is needed. The new thresholds replace
    the old ones. Images that the model's memory was made from do not count: their scores are next to nothing.
    """
    from ..calibrate.images import find_images
    from ..calibrate.recalibrate import recalibrate

    console = log()
    found = recalibrate(
        bundle,
        find_images(normal, exclude or ()),
        precisions=None if precision is None else [part.strip() for part in precision.split(",") if part.strip()],
        pixel_fpr=pixel_fpr,
        image_fpr=image_fpr,
        target=out,
        dry_run=dry_run,
        console=console,
    )
    Console(highlight=False).print(_table(found.changes))
    for note in found.notes:
        console.print(f"note: {escape(note)}", style="yellow", soft_wrap=True)
    for item in found.dropped:
        verb = "would be" if dry_run else "was"
        console.print(
            f"{escape(item)} {verb} removed from the bundle: it was not calibrated", style="yellow", soft_wrap=True
        )
    if dry_run:
        console.print("Nothing was written.")
        return
    print(bundle if out is None else out)


def _table(changes: tuple[Change, ...]) -> Table:
    """Old and new T at the default rates, and what each decides on the new images."""
    count = len(changes[0].scores)
    table = Table(title=f"Thresholds at the default rates, on {count} images of good parts", title_justify="left")
    for heading in ("precision", "of", "T before", "T now", "FPR", "above T before", "above T now"):
        table.add_column(heading, justify="left" if heading in ("precision", "of") else "right")
    for item in changes:
        before, after = item.before, item.after
        table.add_row(
            item.precision,
            "images",
            f"{before.image.at():.5g}",
            f"{after.image.at():.5g}",
            _rate(before.image.default_fpr, after.image.default_fpr),
            f"{item.rejected_before} of {count}",
            f"{item.rejected_after} of {count}",
        )
        table.add_row(
            "",
            "pixels",
            f"{before.pixel.at():.5g}",
            f"{after.pixel.at():.5g}",
            _rate(before.pixel.default_fpr, after.pixel.default_fpr),
            f"{100 * item.marked_before:.3g} %",
            "",
        )
    table.caption = "Images above T are called defective, pixels above T are marked."
    table.caption_justify = "left"
    return table


def _rate(before: float, after: float) -> str:
    return f"{after:g}" if before == after else f"{before:g} -> {after:g}"
