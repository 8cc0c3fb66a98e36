"""The commands `saae-export engine` and `saae-export doctor`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from saae_runtime.terminal import log

from ..doctor import doctor, print_diagnosis
from ..parity.compare import parity_table
from ..parity.verify import Skipped
from ..tensorrt.compile import EngineOptions, build_engine
from ..tensorrt.gate import gate

__all__ = ["add_commands", "doctor_command", "engine_command"]


def engine_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", show_default=False)],
    library: Annotated[
        str, typer.Option(help="tensorrt (builds on the GPU that it is for) or tensorrt-rtx (also without a GPU).")
    ] = "tensorrt",
    target: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="SM", help="GPU generation: sm89, or several: sm86,sm89. Else this machine's GPU."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp16, fp32 or int8: which graph of the bundle.")] = "fp16",
    min_batch: Annotated[int, typer.Option(min=1, help="Smallest batch.")] = 1,
    opt_batch: Annotated[int, typer.Option(min=1, help="Batch that the engine is tuned for.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch.")] = 8,
    opt_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Builder's effort: 0 builds fast, 5 searches longest.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(min=1, metavar="MIB", help="Limit of scratch memory.")] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for later TensorRT releases (slower).")
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(metavar="LEVEL", help="ampere-plus or same-compute-capability: other GPUs too (TensorRT only)."),
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU to build on.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compile a bundle's graph to a TensorRT engine and put it into the bundle.

    Types are the graph's own (strong typing), so FP16 is exactly what was calibrated and compared. Where this machine
    runs the engine, it is compared with the bundle's reference frames; exit code 3: it disagrees and is not kept.
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
        f"{artefact.file}: {len(compiled.data) / (1 << 20):.1f} MiB, {artefact.library} {artefact.library_version}, "
        f"{artefact.sm}, batch {min_batch} to {max_batch}, {compiled.network.layers} layers, {compiled.seconds:.1f} s"
    )
    found = gate(built, device)
    if isinstance(found, Skipped):
        console.print(f"not compared here: {escape(found.why)}")
    else:
        console.print(parity_table([found]))
    print(built.bundle.file(artefact.file))


def doctor_command(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, to ask which of its files run here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Say what this machine can run, what is missing, and what to type to get it. Never fails."""
    found = doctor(bundle)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_diagnosis(found, Console(highlight=False))


def add_commands(app: typer.Typer) -> None:
    """Mounts both commands on an app."""
    app.command("engine")(engine_command)
    app.command("doctor")(doctor_command)
