"""The command `saae-export`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saae_runtime.bundle import open_bundle
from saae_runtime.errors import ConfigError
from saae_runtime.terminal import LineCommand, command_group, log, run_command

from .build import build_command
from .calibrate import calibrate_command
from .engine import add_commands
from .needs import need_export
from .triton import triton_command
from .verify import verify_command

__all__ = ["app", "main"]

app = command_group("Build a verified bundle from images of good parts; inspect it, check it, and adapt it.")


def onnx_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the fitted model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("model.onnx"),
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    frame_size: Annotated[
        str, typer.Option(help="Size of the camera's frames, HEIGHTxWIDTH; model: the model's input.")
    ] = "model",
    threshold: Annotated[
        float, typer.Option(help="Default pixel threshold T, which an input of the graph overrides.")
    ] = 1.0,
) -> None:
    """Export a fitted model as a single ONNX file, without thresholds and bundle."""
    need_export()
    from saae_train.model.checkpoint import load_checkpoint

    from ..graph.fused import FusedGraph
    from ..graph.onnx_file import export_onnx
    from ..pipeline.options import parse_frame_size

    if frame_size == "auto":
        raise ConfigError(
            "--frame-size auto needs images.", "Only `build` has them.", "--frame-size model or 1024x1280"
        )
    found = load_checkpoint(checkpoint)
    graph = FusedGraph(found.detector, parse_frame_size(frame_size, None), precision)
    export_onnx(graph, out, threshold, {"saae.category": found.category})
    log().print(f"{out}: {precision}, frame {graph.frame_size[0]} x {graph.frame_size[1]}, checked")
    print(out)


def inspect_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on standard output.")] = False,
    check: Annotated[bool, typer.Option(help="Check the hashes of the files first.")] = True,
) -> None:
    """Show what is in a bundle: model, frame size, thresholds, graphs and engines, parity, files."""
    from .inspect import print_bundle

    opened = open_bundle(bundle, verify=check)
    if as_json:
        print(json.dumps(opened.manifest.to_json(), indent=2))
        return
    print_bundle(opened, Console(highlight=False))


# in the order of the help
app.command("build", cls=LineCommand)(build_command)
app.command("inspect", cls=LineCommand)(inspect_command)
app.command("verify", cls=LineCommand)(verify_command)
app.command("calibrate", cls=LineCommand)(calibrate_command)
add_commands(app)
app.command("triton", cls=LineCommand)(triton_command)
app.command("onnx", cls=LineCommand)(onnx_command)


def main() -> None:
    """Entry point."""
    run_command(app, "saae-export")


if __name__ == "__main__":
    main()
