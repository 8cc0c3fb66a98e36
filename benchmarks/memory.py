"""Resident memory over many calls of one engine: does it stay flat?

    python benchmarks/memory.py BUNDLE [--calls 20000] [--backend auto] [--threads N] [--frame-size HxW] [--out FILE]
    python benchmarks/memory.py --random ...

Frames of the camera's size go through the Engine one by one; every result is dropped at once. Resident memory is read
after 1,000 calls, when every buffer has been made, and then twenty times up to the end. Growth is the largest reading
after that first one, against it.

--random takes a small ViT with random weights instead of a bundle: what could leak is in the calls, not in the size of
the graph, and 20,000 calls of it take minutes. It is exported in another process, so that PyTorch is not in this one.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.engine import Engine
from saae_runtime.errors import ConfigError, SaaeError

FIRST = 1000
READINGS = 20
RANDOM = "vit_tiny_patch16_224"


def watch(
    call: Callable[[], object],
    calls: int,
    first: int = FIRST,
    also: Callable[[], dict[str, float]] = dict,
) -> list[dict[str, float]]:
    """Call repeatedly and return readings: {call, resident_mib, seconds}, the first after `first` calls.

    Args:
        call: what to call.
        calls: number of calls.
        first: calls before the first reading.
        also: adds to each reading, for instance the memory in use on a GPU.

    Raises:
        ConfigError: fewer calls than the first reading needs, or a system that does not report memory.
    """
    if calls <= first or common.resident_mib() == 0:
        raise ConfigError(
            f"Memory over {calls} calls cannot be watched.",
            f"The first reading comes after {first} calls, from /proc/self/status.",
            "on Linux: --calls 20000",
        )
    points = {int(point) for point in np.linspace(first, calls, READINGS + 1)}
    found = []
    start = time.perf_counter()
    for number in range(1, calls + 1):
        call()
        if number in points:
            found.append(
                {
                    "call": number,
                    "resident_mib": round(common.resident_mib(), 2),
                    "seconds": round(time.perf_counter() - start, 2),
                    **also(),
                }
            )
    return found


def growth(readings: list[dict[str, float]]) -> float:
    """Largest later reading over the first, minus one."""
    later = max(reading["resident_mib"] for reading in readings[1:])
    return later / readings[0]["resident_mib"] - 1


def export_random(folder: Path) -> None:
    """Write a bundle of a small ViT with random weights, 64 x 64 pixels."""
    from benchmarks.random_model import random_bundle, random_checkpoint, random_config

    config = random_config(RANDOM, "fast", (1, 2), (64, 64), latent=24, components=32)
    random_bundle(random_checkpoint(config), folder, None, ["fp32"])


def in_another_process(folder: Path) -> Path:
    """Run `export_random` in a separate process; return the folder."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(export_random, folder).result()
    return folder


def main(
    bundle: Annotated[Path | None, typer.Argument(help="a built bundle; or give --random")] = None,
    random: Annotated[bool, typer.Option("--random", help="a small model of random weights")] = False,
    calls: Annotated[int, typer.Option(help="calls in all")] = 20000,
    backend: Annotated[str, typer.Option(help="as in Engine(backend=...)")] = "auto",
    precision: Annotated[str | None, typer.Option(help="as in Engine(precision=...)")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every usable core")] = None,
    frame_size: Annotated[str, typer.Option(help="camera frame, HEIGHTxWIDTH")] = "1024x1024",
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Watch the memory of one engine; print and write the table."""
    common.use_threads(threads or common.usable_cores())
    common.print_machine()
    try:
        if (bundle is None) != random:
            raise ConfigError("Give a bundle, or --random, and not both.", "", "python benchmarks/memory.py --random")
        height, width = (int(side) for side in frame_size.split("x"))
        rng = np.random.default_rng(0)
        frames = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(4)]
        with (
            tempfile.TemporaryDirectory() as folder,
            Engine(
                bundle or in_another_process(Path(folder) / "bundle"), backend=backend, precision=precision
            ) as engine,
        ):
            turn = iter(range(calls))
            readings = watch(lambda: engine(frames[next(turn) % len(frames)]), calls)
            description = engine.backend.description
    except ValueError:
        print(f"--frame-size {frame_size} is not HEIGHTxWIDTH, for instance 1024x1024", file=sys.stderr)
        raise typer.Exit(2) from None
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    rows: list[dict[str, Any]] = [dict(reading) for reading in readings]
    grown = growth(readings)
    data = common.result(
        "memory",
        rows,
        settings={"calls": calls, "first": FIRST, "frame_size": [height, width], "threads": threads},
        bundle=f"{RANDOM} at 64x64, random weights" if bundle is None else bundle.name,
        inside="resident memory of the whole process, one frame a call, results dropped at once",
        backend=description,
        growth=round(grown, 5),
        torch_imported="torch" in sys.modules,
    )
    common.print_table(
        f"Resident memory over {calls} calls: {100 * grown:+.2f} % after call {FIRST}",
        ["call", "MiB", "seconds"],
        [(reading["call"], reading["resident_mib"], reading["seconds"]) for reading in readings],
        [description, f"Written to {common.write_result(data, out)}"],
    )


if __name__ == "__main__":
    typer.run(main)
