"""The command `saae-export triton`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from saae_runtime.errors import ConfigError
from saae_runtime.terminal import log

__all__ = ["triton_command"]


def triton_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    repository: Annotated[
        Path,
        typer.Option(
            "--repository", metavar="DIR", help="Write DIR/onnx, DIR/tensorrt, DIR/python.", show_default=False
        ),
    ],
    name: Annotated[str | None, typer.Option(help="The model's name. Default: the bundle's category.")] = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND[,KIND]", help="Which repositories: onnx, tensorrt, python.")
    ] = "onnx,tensorrt,python",
    precision: Annotated[
        str | None, typer.Option(help="Which graph of the bundle: fp32, fp16 or int8. Default: the first.")
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", help="Frames of the largest batch.")] = 8,
    queue_delay: Annotated[
        int, typer.Option(metavar="MICROSECONDS", help="How long a request may wait for others to form a batch.")
    ] = 0,
    instances: Annotated[int, typer.Option(metavar="N", help="Copies that compute at the same time.")] = 1,
    device: Annotated[str, typer.Option(help="auto (GPUs if there are any), cpu or gpu.")] = "auto",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of one instance.")] = None,
    backend: Annotated[str, typer.Option(help="python only: backend of saae, as in saae-run --backend.")] = "auto",
    environment: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="python only: the server's Python environment with saae and numpy 1."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Write a bundle as models of NVIDIA's Triton Inference Server.

    One repository for each kind of server: DIR/onnx for its onnxruntime backend, DIR/tensorrt for a plan (if the
    bundle holds a TensorRT engine), DIR/python for its Python backend. saae_runtime.TritonEngine is the client.
    """
    from ..triton.config import ServerOptions
    from ..triton.repository import export_triton

    console = log()
    options = ServerOptions(max_batch, queue_delay, instances, device, threads)
    written, left = export_triton(
        bundle,
        repository,
        name=name,
        kinds=list(dict.fromkeys(part.strip() for part in kind.split(",") if part.strip())),
        precision=precision,
        options=options,
        backend=backend,
        environment=environment,
        console=None if quiet else console,
    )
    if not written:
        raise ConfigError(f"Nothing was written: {left[0].why}", "", left[0].cure)
    for kept in left:
        console.print(f"no {kept.kind} model: {escape(kept.why)}", style="yellow", soft_wrap=True)
        if kept.cure:
            console.print(f"  try: {escape(kept.cure)}", style="yellow", soft_wrap=True)
    for item in written:
        console.print(f"{item.kind}: {escape(item.serve)}", soft_wrap=True)
        print(item.folder)
