"""Time that the line service adds to an engine's call, and memory over many parts.

    python benchmarks/line.py BUNDLE [--size 1024x1024] [--runs 200] [--soak 100000] [--posts 50] [--out FILE]

  delay  A part is requested, its frame comes from memory, its verdict is given: time from request to verdict, against
         `engine(frame)` of the same frame, alternately. Sinks: JSON lines, CSV, SQLite and MQTT to a mosquitto that is
         started here (without one: to a dead broker, as the result says). `added_cpu` is the processor time of all
         threads, which other work on the machine hardly changes.
  posts  The same parts, while another process posts images to the HTTP service, against parts without posts. That
         process runs here at the lowest priority, in place of another machine.
  soak   Parts as fast as they are judged, at the bundle's own size, with JSON lines, CSV, SQLite and MQTT: resident
         memory when a tenth, half and all of them are in every sink; whether the order was kept, and every part is
         in every file.
  stop   A line that judges as fast as it can is closed: how long that takes, and whether every frame that was read is
         accounted for.

Frames are gray with a little noise, and every fourth has a white spot.
"""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.line_figures import line_figures
from benchmarks.line_parts import Asker, Memory, broker, frames_of, heap_mib, open_line, quantiles
from benchmarks.line_posts import posts
from saae_runtime.line.service import Line

_RANKS = (0.5, 0.95, 0.99)


def delay(bundle: Path, size: tuple[int, int], runs: int, threads: int | None) -> dict[str, Any]:
    """Milliseconds of the engine alone and of the service: median, 95th and 99th percentile."""
    frames = frames_of(size)
    alone, service, added, cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, is_there):
        asker = Asker()
        with open_line(Path(name), bundle, port, "asked", threads, Memory(frames, None), asker) as line:
            engine = line.book.get("r").shared.engine
            line.start()
            for run in range(runs + 10):
                frame = frames[(run + 1) % len(frames)]
                start, spent = time.perf_counter(), time.process_time()
                engine(frame)
                one, first = time.perf_counter() - start, time.process_time() - spent
                spent = time.process_time()
                two = asker.ask()
                second = time.process_time() - spent
                if run >= 10:
                    alone.append(1000 * one)
                    service.append(1000 * two)
                    added.append(1000 * (two - one))
                    cpu.append(1000 * (second - first))
                time.sleep(0.01)  # parts come at intervals; the sinks work in between
            backend = engine.backend.description
    rows = {"engine": alone, "service": service, "added": added, "added_cpu": cpu}
    return {
        "part": "delay",
        "backend": backend,
        "mqtt": is_there,
        "size": list(size),
        "runs": runs,
        **{f"{key}_ms": quantiles(values, *_RANKS) for key, values in rows.items()},
    }


def soak(bundle: Path, count: int, threads: int | None) -> dict[str, Any]:
    """Memory over many parts, and whether each was recorded."""
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, is_there):
        folder = Path(name)
        camera = Memory([], count)
        marks = (count // 10, count // 2, count)
        camera.pauses = set(marks)
        memory, heap, held = [], [], []
        with open_line(folder, bundle, port, "free", threads, camera, None) as line:
            camera.frames = frames_of(line.book.get("r").shared.engine.backend.frame_size)
            start = time.perf_counter()
            line.start()
            for mark in marks:
                while not _delivered(line, mark, is_there):
                    time.sleep(0.05)
                memory.append(round(common.resident_mib(), 1))
                heap.append(None if heap_mib() is None else round(heap_mib() or 0.0, 1))
                held.append(sys.getallocatedblocks())
                camera.pauses.discard(mark)
            seconds = time.perf_counter() - start
            health = line.health()
        with (folder / "records.jsonl").open() as stream:
            json_ids = [json.loads(line_)["part_id"] for line_ in stream]
        with (folder / "records.csv").open(newline="") as stream:
            csv_ids = [row["part_id"] for row in csv.DictReader(stream)]
        with sqlite3.connect(folder / "records.sqlite") as database:
            rows = database.execute("SELECT count(*) FROM parts").fetchone()[0]
    expected = [f"{number:08d}" for number in range(1, count + 1)]
    return {
        "part": "soak",
        "frames": count,
        "seconds": round(seconds, 1),
        "counts": health["stations"][0]["counts"],
        "delivered": {sink["name"]: sink["delivered"] for sink in health["sinks"]},
        "mqtt": is_there,
        "order_kept": json_ids == expected and csv_ids == expected,
        "all_accounted": len(json_ids) == len(csv_ids) == rows == count,
        "rss_mib": memory,
        "heap_mib": heap,
        "python_blocks": held,
        "latency_ms": health["stations"][0]["latency_ms"],
    }


def _delivered(line: Line, count: int, mqtt: bool) -> bool:
    sinks = [sink for sink in line.health()["sinks"] if mqtt or sink["name"] != "mqtt"]
    return all(sink["delivered"] >= count and not sink["backlog"] for sink in sinks)


def stop(bundle: Path, threads: int | None, runs: int = 5) -> dict[str, Any]:
    """Close a line at full speed, with waiting frames."""
    seconds, accounted = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, _):
            camera = Memory([], None)
            with open_line(Path(name), bundle, port, "free", threads, camera, None) as line:
                camera.frames = frames_of(line.book.get("r").shared.engine.backend.frame_size)
                line.start()
                time.sleep(2)
                start = time.perf_counter()
                line.close()
                seconds.append(time.perf_counter() - start)
                counts = line.stations["one"].reading().counts
            written = sum(1 for _ in (Path(name) / "records.jsonl").open())
            read = camera.stats.grabbed
            accounted.append(counts["OK"] + counts["NG"] + counts["dropped"] == read == written + counts["dropped"])
    return {"part": "stop", "seconds": round(max(seconds), 2), "runs": runs, "all_accounted": all(accounted)}


def main(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    size: Annotated[str, typer.Option(help="Of the frames of `delay` and `posts`, HEIGHTxWIDTH.")] = "1024x1024",
    runs: Annotated[int, typer.Option(min=1, help="Parts of `delay`, and of each half of `posts`.")] = 200,
    small: Annotated[Path | None, typer.Option(help="Bundle of `soak` and `stop`; default: the same.")] = None,
    count: Annotated[int, typer.Option("--soak", min=0, help="Parts of `soak`; 0: none.")] = 100_000,
    rate: Annotated[int, typer.Option("--posts", min=0, help="Images a second of `posts`; 0: none.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one inference.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file.")] = None,
) -> None:
    """Measure what the line service adds, and whether it stays flat."""
    height, width = (int(part) for part in size.split("x"))
    rows = []
    if count:  # first, because the others leave memory behind
        rows += [soak(small or bundle, count, threads), stop(small or bundle, threads)]
    rows.append(delay(bundle, (height, width), runs, threads))
    if rate:
        rows.append(posts(bundle, (height, width), runs, rate, threads))
    data = common.result(
        "line",
        rows,
        settings={"size": [height, width], "runs": runs, "soak": count, "posts": rate, "threads": threads},
        bundle=bundle.name,
        inside="delay, posts: from asking for a part, its frame in memory, to its verdict; the engine alternately",
    )
    common.print_table("The line service", ["figure", "value"], line_figures(data))
    print(f"Written to {common.write_result(data, out)}")


if __name__ == "__main__":
    typer.run(main)
