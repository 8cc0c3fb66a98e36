"""Frames a second and latency of a Triton server, by the number of concurrent clients.

    python benchmarks/served.py URL MODEL [--concurrency 1,2,4,8] [--seconds 5] [--out FILE]

The server is a running one, with a model that `saae-export triton` has written. Each client is a thread that sends one
frame of the model's size, waits for the answer, and sends the next. Two kinds of request: `result` returns score and
map and makes the mask; `verdict` returns only the score. The two kinds and all numbers of clients take turns, in three
rounds that make `--seconds` together; the first request of every turn is not counted. On one machine the server and the
clients share its cores.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime import TritonEngine
from saae_runtime.errors import SaaeError

ROUNDS = 3
KINDS = ("result", "verdict")


def turn(ask: Callable[[], object], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each counted request, and of the whole turn, with concurrent threads."""
    start = threading.Barrier(clients + 1)
    stop = threading.Event()
    times: list[list[float]] = [[] for _ in range(clients)]
    failed: list[BaseException] = []

    def client(own: list[float]) -> None:
        try:
            ask()
            start.wait()
            while not stop.is_set():
                began = time.perf_counter()
                ask()
                own.append(time.perf_counter() - began)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:  # raised in the waiting thread
            failed.append(error)
            start.abort()

    threads = [threading.Thread(target=client, args=(own,), daemon=True) for own in times]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    try:
        start.wait()
        began = time.perf_counter()
        time.sleep(seconds)
    except threading.BrokenBarrierError:
        pass
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [value for own in times for value in own], time.perf_counter() - began


def measure(engine: TritonEngine, concurrency: list[int], seconds: float) -> list[dict[str, Any]]:
    """One row for each kind of request and number of clients: frames a second, and the delay's distribution."""
    frame = np.random.default_rng(0).integers(0, 256, (*engine.backend.frame_size, 3), np.uint8)
    asks: dict[str, Callable[[], object]] = {"result": lambda: engine(frame), "verdict": lambda: engine.verdict(frame)}
    cells = [(kind, clients) for kind in KINDS for clients in concurrency]
    times: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    walls = dict.fromkeys(cells, 0.0)
    for _ in range(ROUNDS):
        for kind, clients in cells:
            found, wall = turn(asks[kind], clients, seconds / ROUNDS)
            times[kind, clients] += found
            walls[kind, clients] += wall
    return [
        {
            "request": kind,
            "clients": clients,
            "frames_per_second": len(times[kind, clients]) / walls[kind, clients],
            "p50_ms": float(1000 * np.quantile(times[kind, clients], 0.5)),
            "p99_ms": float(1000 * np.quantile(times[kind, clients], 0.99)),
            "requests": len(times[kind, clients]),
        }
        for kind, clients in cells
    ]


def main(
    url: Annotated[str, typer.Argument(help="grpc://host:8001 or http://host:8000")],
    model: Annotated[str, typer.Argument(help="the model's name")],
    concurrency: Annotated[str, typer.Option(help="numbers of clients, with commas")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=0.1, help="of each row")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Load a Triton server; print and write the table."""
    common.print_machine()
    try:
        clients = [int(part) for part in concurrency.split(",")]
        if min(clients) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter("numbers from 1 up, with commas", param_hint="--concurrency") from None
    try:
        with TritonEngine(url, model, wait=60) as engine:
            rows = measure(engine, clients, seconds)
            height, width = engine.backend.frame_size
            about = {
                "server": engine.explain(),
                "frame": [height, width],
                "max_batch": engine.backend.max_batch,
                "backbone": engine.manifest.backbone.name,
            }
    except SaaeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    data = common.result(
        "triton",
        rows,
        settings={"seconds": seconds, "rounds": ROUNDS, **about},
        inside="one frame of the model's size: sent, scored, answer received; result: map and mask as well",
    )
    common.print_table(
        f"Triton, {height} x {width} frames",
        ["request", "clients", "frames/s", "p50 ms", "p99 ms"],
        [(row["request"], row["clients"], row["frames_per_second"], row["p50_ms"], row["p99_ms"]) for row in rows],
        [f"{about['server']}; batches up to {about['max_batch']}.", f"Written to {common.write_result(data, out)}"],
    )


if __name__ == "__main__":
    typer.run(main)
