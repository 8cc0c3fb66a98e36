"""The commands `saae-export engine` and `saae-export doctor`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from saae_runtime.backends.tensorrt.library import known_fault
from saae_runtime.terminal import LineCommand, log

from ..doctor import doctor, print_diagnosis
from ..parity.compare import parity_table
from ..parity.verify import Skipped
from ..tensorrt.compile import EngineOptions, build_engine
from ..tensorrt.gate import gate

__all__ = ["add_commands", "doctor_command", "engine_command"]


def engine_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    library: Annotated[
        str, typer.Option(help="tensorrt (on the GPU itself) or tensorrt-rtx (also without a GPU).")
    ] = "tensorrt",
    target: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="SM[,SM]", help="GPU generation, e.g. sm89 or sm86,sm89. Default: that of this machine."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Which graph of the bundle: fp16, fp32 or int8.")] = "fp16",
    min_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Smallest batch size.")] = 1,
    opt_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Batch size that the engine is tuned for.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Largest batch size.")] = 8,
    opt_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, metavar="N", help="Optimisation level: 0 builds fastest, 5 searches longest."),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Limit of the workspace memory, in MiB.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Make it run on later TensorRT releases as well (slower).")
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL", help="Make it run on other GPUs: ampere-plus, or same-compute-capability (TensorRT only)."
        ),
    ] = None,
    device: Annotated[int, typer.Option(min=0, metavar="N", help="Index of the GPU to build on.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compile a graph of a bundle to a TensorRT engine and add it to the bundle.

    The network is strongly typed, so that FP16 is exactly what was calibrated and compared. If this machine can run
    the engine, it is compared on the bundle's reference frames. Exit code 3: it disagrees and is not kept.
    """
    console = log()
    built = build_engine(
        bundle,
        library=library,
        sms=[sm for sm in (target or "").split(",") if sm.strip()],
        precision=precision,
        options=EngineOptions(
            min_batch=min_batch,
            opt_batch=max(opt_batch, min_batch),
            max_batch=max_batch,
            opt_level=opt_level,
            workspace=workspace,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible.lower().replace("-", "_") if hardware_compatible else None,
        ),
        device=device,
        console=None if quiet else console,
    )
    artefact, compiled = built.artefact, built.compiled
    console.print(
        f"{escape(artefact.file)}: {len(compiled.data) / (1 << 20):.1f} MiB, "
        f"{artefact.library} {artefact.library_version}, {artefact.sm}, "
        f"batch {min_batch} to {max_batch}, {compiled.network.layers} layers, {compiled.seconds:.1f} s"
    )
    fault, cure = known_fault(str(artefact.library), str(artefact.library_version))
    if fault:
        console.print(f"[yellow]warning:[/yellow] {escape(fault)}.\n  try: {escape(cure)}")
    found = gate(built, device)
    if isinstance(found, Skipped):
        console.print(f"not compared here: {escape(found.why)}")
    else:
        console.print(parity_table([found]))
    print(built.bundle.file(artefact.file))


def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder of a bundle: which of its files can run here?", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Show what this machine can run, what is missing, and how to install it. Never fails."""
    found = doctor(bundle)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_diagnosis(found, Console(highlight=False))


def add_commands(app: typer.Typer) -> None:
    """Mount both commands on an app."""
    app.command("engine", cls=LineCommand)(engine_command)
    app.command("doctor", cls=LineCommand)(doctor_command)
