"""The command `saae-export verify`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saae_runtime.bundle import Bundle
from saae_runtime.errors import ConfigError
from saae_runtime.terminal import log

from .needs import need_export

__all__ = ["verify_command"]


def verify_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Folder of images to compare on. Default: the bundle's own frames.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The fitted model, to run PyTorch here as the reference.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Check only this backend. Default: all that work here.")] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Name the first node at which FP16 departs from FP32.")
    ] = False,
) -> None:
    """Check a bundle's hashes, and compare every graph and engine that runs here with its reference.

    Exit code 3: one of them disagrees.
    """
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


def _diagnose(bundle: Bundle, console: Console) -> None:
    need_export()
    from saae_runtime.reference import read_reference

    from ..parity.compare import BOUNDS
    from ..parity.nodes import compare_nodes

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
