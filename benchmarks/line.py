"""What the line service adds to an engine's call, and whether it stays flat over many parts.

    python benchmarks/line.py BUNDLE [--size 1024x1024] [--runs 200] [--soak 100000] [--out FILE]

  delay  A part is asked for, its frame comes from memory, its verdict is given: from asking to the verdict, against
         `engine(frame)` of the same frame alone. Alternately, so that a busy machine slows both. On: JSON lines, CSV,
         SQLite and MQTT to a mosquitto that is started here (without one: to a dead broker, which the result says).
         `added_cpu` is the processor time of all threads, which other work on the machine hardly changes.
  soak   Parts as fast as they are judged, with JSON lines, CSV, SQLite and MQTT: resident memory at twenty moments,
         whether the order was kept, and whether every part is in every file.

Frames are gray with a little noise, and every fourth has a white spot.
"""

from __future__ import annotations

import csv
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.line.camera import CameraStats, EndOfFrames, NoFrameError, Shot
from saae_runtime.line.config import load_config
from saae_runtime.line.part import Choice, Trigger, Verdict, now
from saae_runtime.line.service import Line
from saae_runtime.line.sinks import KINDS

_TOML = """
[[station]]
name = "one"
camera = "-"
trigger = "{trigger}"
recipes = ["r"]
verdict_timeout = 60.0
[[recipe]]
name = "r"
bundle = {bundle}
{threads}
[[sink]]
kind = "jsonl"
path = "records.jsonl"
[[sink]]
kind = "csv"
path = "records.csv"
[[sink]]
kind = "sqlite"
path = "records.sqlite"
[[sink]]
kind = "mqtt"
host = "127.0.0.1"
port = {port}
"""


class Memory:
    """A camera that gives frames from memory, so many."""

    live = False

    def __init__(self, frames: list[Any], count: int | None) -> None:
        self._frames, self._count, self._given = frames, count, 0

    @property
    def stats(self) -> CameraStats:
        """What it has done."""
        return CameraStats(grabbed=self._given)

    def trigger(self) -> None:
        """Nothing to do."""

    def grab(self, timeout: float) -> Shot:
        """The next frame."""
        if self._count is not None and self._given >= self._count:
            raise EndOfFrames
        self._given += 1
        return Shot(self._frames[self._given % len(self._frames)], f"{self._given:08d}.png", now())

    def close(self) -> None:
        """Nothing to do."""


class Asker:
    """Asks for one part and waits for its verdict."""

    def __init__(self) -> None:
        self._asked, self._answered = threading.Event(), threading.Event()
        self._number = 0

    def ask(self) -> float:
        """Seconds from asking to the verdict."""
        self._answered.clear()
        start = time.perf_counter()
        self._asked.set()
        self._answered.wait()
        return time.perf_counter() - start

    def wait(self, timeout: float) -> Trigger | None:
        """The part that was asked for."""
        if not self._asked.wait(timeout):
            return None
        self._asked.clear()
        self._number += 1
        return Trigger(f"part-{self._number}")

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        """Takes the verdict."""
        self._answered.set()
        return True

    def fail(self, part_id: str, reason: str) -> None:
        """A part without a verdict ends the measurement."""
        raise NoFrameError(reason)

    def fault(self, reason: str) -> None:
        """Ends the measurement."""
        raise NoFrameError(reason)

    def recover(self) -> None:
        """Nothing to do."""

    def missed(self) -> list[tuple[Trigger, str]]:
        """None."""
        return []

    def choices(self) -> list[Choice]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing to do."""


@contextmanager
def broker(folder: Path) -> Iterator[tuple[int, bool]]:
    """A mosquitto: its port, and whether it is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        yield port, False
        return
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    with subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(0.5)
        try:
            yield port, True
        finally:
            process.kill()


def _frames(size: tuple[int, int]) -> list[Any]:
    random = np.random.default_rng(0)
    frames = [random.integers(125, 132, (*size, 3), dtype=np.uint8) for _ in range(4)]
    frames[0][size[0] // 4 : size[0] // 3, size[1] // 4 : size[1] // 3] = 255
    return frames


def _line(folder: Path, bundle: Path, port: int, trigger: str, threads: int | None, camera: Memory, asker: Any) -> Line:
    limited = "" if threads is None else f"threads = {threads}"
    text = _TOML.format(bundle=json.dumps(str(bundle.resolve())), port=port, trigger=trigger, threads=limited)
    (folder / "line.toml").write_text(text)
    return Line(load_config(folder / "line.toml", KINDS), lambda *_: camera, lambda *_: asker)


def delay(bundle: Path, size: tuple[int, int], runs: int, threads: int | None) -> dict[str, Any]:
    """Milliseconds of the engine alone and of the service, medians and the 95th percentile."""
    frames = _frames(size)
    alone, service, added, cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, is_there):
        asker = Asker()
        with _line(Path(name), bundle, port, "asked", threads, Memory(frames, None), asker) as line:
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
                time.sleep(0.01)  # a line has a beat; the sinks work in between
            backend = engine.backend.description
    rows = {"engine": alone, "service": service, "added": added, "added_cpu": cpu}
    return {
        "backend": backend,
        "mqtt": is_there,
        "size": list(size),
        "runs": runs,
        **{f"{key}_ms": [round(float(np.quantile(values, q)), 3) for q in (0.5, 0.95)] for key, values in rows.items()},
    }


def soak(bundle: Path, count: int, threads: int | None) -> dict[str, Any]:
    """Memory over many parts, and what became of each."""
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, is_there):
        folder = Path(name)
        camera = Memory([], count)
        with _line(folder, bundle, port, "free", threads, camera, None) as line:
            height, width = line.book.get("r").shared.engine.backend.frame_size
            camera._frames = _frames((height, width))
            start = time.perf_counter()
            line.start()
            step, due = count / 20, count / 20
            while not line.finished:
                time.sleep(0.02)
                if camera.stats.grabbed >= due:
                    memory.append(round(common.resident_mib(), 1))
                    due += step
            seconds = time.perf_counter() - start
            while any(sink["backlog"] for sink in line.health()["sinks"] if is_there or sink["name"] != "mqtt"):
                time.sleep(0.1)
            memory.append(round(common.resident_mib(), 1))
            health = line.health()
        with (folder / "records.jsonl").open() as stream:
            json_ids = [json.loads(line_)["part_id"] for line_ in stream]
        with (folder / "records.csv").open(newline="") as stream:
            csv_ids = [row["part_id"] for row in csv.DictReader(stream)]
        with sqlite3.connect(folder / "records.sqlite") as database:
            rows = database.execute("SELECT count(*) FROM parts").fetchone()[0]
    expected = [f"{number:08d}" for number in range(1, count + 1)]
    sinks = {sink["name"]: sink["delivered"] for sink in health["sinks"]}
    return {
        "frames": count,
        "seconds": round(seconds, 1),
        "counts": health["stations"][0]["counts"],
        "delivered": sinks,
        "mqtt": is_there,
        "order_kept": json_ids == expected and csv_ids == expected,
        "all_accounted": len(json_ids) == len(csv_ids) == rows == count,
        "rss_mib": memory,
        "latency_ms": health["stations"][0]["latency_ms"],
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    size: Annotated[str, typer.Option(help="Of the frames of `delay`, HEIGHTxWIDTH.")] = "1024x1024",
    runs: Annotated[int, typer.Option(min=1, help="Of `delay`.")] = 200,
    count: Annotated[int, typer.Option("--soak", min=0, help="Parts of `soak`; 0: none.")] = 100_000,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one inference.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file.")] = None,
) -> None:
    """Measure what the line service adds, and whether it stays flat."""
    height, width = (int(part) for part in size.split("x"))
    one = delay(bundle, (height, width), runs, threads)
    rows: list[dict[str, Any]] = [{"part": "delay", **one}]
    common.print_table(
        f"From asking for a part to its verdict, {size}",
        ["", "median ms", "95 % ms"],
        [(key, *one[f"{key}_ms"]) for key in ("engine", "service", "added", "added_cpu")],
        [one["backend"], "MQTT on" if one["mqtt"] else "no broker here: MQTT with a dead one"],
    )
    if count:
        two = soak(bundle, count, threads)
        rows.append({"part": "soak", **two})
        common.print_table(
            f"{count} parts in {two['seconds']} s, every sink on",
            ["", "value"],
            [
                ("order kept", str(two["order_kept"])),
                ("every part in every file", str(two["all_accounted"])),
                ("delivered", str(two["delivered"])),
                ("resident MiB, twenty moments and the end", " ".join(str(value) for value in two["rss_mib"])),
            ],
        )
    data = common.result(
        "line",
        rows,
        settings={"size": [height, width], "runs": runs, "soak": count, "threads": threads},
        bundle=bundle.name,
        inside="delay: from asking for a part, its frame in memory, to its verdict; the engine alone alternately",
    )
    print(f"Written to {common.write_result(data, out)}")


if __name__ == "__main__":
    typer.run(main)
