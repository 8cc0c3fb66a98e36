"""What the benchmarks of the line service share: a camera and a trigger in memory, a broker, a line with every sink."""

from __future__ import annotations

import ctypes
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from saae_runtime.line.camera import CameraStats, EndOfFrames, NoFrameError, Shot
from saae_runtime.line.config import load_config
from saae_runtime.line.part import Choice, Trigger, Verdict, now
from saae_runtime.line.service import SWITCH_SECONDS, Line
from saae_runtime.line.sinks import KINDS
from saae_runtime.line.wiring import SECTIONS

__all__ = ["Asker", "Memory", "broker", "frames_of", "heap_mib", "open_line", "quantiles"]

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
    """A camera that gives frames from memory, so many; None: without end."""

    live = False

    def __init__(self, frames: list[Any], count: int | None) -> None:
        self.frames, self._count, self._given = frames, count, 0
        self.pauses: set[int] = set()

    @property
    def stats(self) -> CameraStats:
        """Counts so far."""
        return CameraStats(grabbed=self._given)

    def trigger(self) -> None:
        """Nothing to do."""

    def grab(self, timeout: float) -> Shot:
        """The next frame; none after a number in `pauses`, until it is removed from there."""
        if self._given in self.pauses:
            time.sleep(0.01)
            raise NoFrameError("a pause")
        if self._count is not None and self._given >= self._count:
            raise EndOfFrames
        self._given += 1
        return Shot(self.frames[self._given % len(self.frames)], f"{self._given:08d}.png", now())

    def close(self) -> None:
        """Nothing to do."""


class Asker:
    """Requests one part and waits for its verdict."""

    def __init__(self) -> None:
        self._asked, self._answered = threading.Event(), threading.Event()
        self._number = 0

    def ask(self) -> float:
        """Seconds from the request to the verdict."""
        self._answered.clear()
        start = time.perf_counter()
        self._asked.set()
        self._answered.wait()
        return time.perf_counter() - start

    def wait(self, timeout: float) -> Trigger | None:
        """The requested part."""
        if not self._asked.wait(timeout):
            return None
        self._asked.clear()
        self._number += 1
        return Trigger(f"part-{self._number}")

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        """Take the verdict."""
        self._answered.set()
        return True

    def fail(self, part_id: str, reason: str) -> None:
        """A part without a verdict ends the measurement."""
        raise NoFrameError(reason)

    def fault(self, reason: str) -> None:
        """End the measurement."""
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


def frames_of(size: tuple[int, int]) -> list[Any]:
    """Four frames, uint8 height x width x 3: gray with a little noise, the first one with a white spot."""
    random = np.random.default_rng(0)
    frames = [random.integers(125, 132, (*size, 3), dtype=np.uint8) for _ in range(4)]
    frames[0][size[0] // 4 : size[0] // 3, size[1] // 4 : size[1] // 3] = 255
    return frames


def open_line(
    folder: Path, bundle: Path, port: int, trigger: str, threads: int | None, camera: Memory, asker: Any, more: str = ""
) -> Line:
    """A line of one station, with JSON lines, CSV, SQLite and MQTT, and what `more` adds to its file."""
    sys.setswitchinterval(SWITCH_SECONDS)  # as the command does
    limited = "" if threads is None else f"threads = {threads}"
    text = _TOML.format(bundle=json.dumps(str(bundle.resolve())), port=port, trigger=trigger, threads=limited)
    (folder / "line.toml").write_text(text + more)
    return Line(load_config(folder / "line.toml", KINDS, SECTIONS), lambda *_: camera, lambda *_: asker)


def quantiles(values: list[float], *ranks: float) -> list[float]:
    """Quantiles of milliseconds, to the microsecond."""
    return [round(float(value), 3) for value in np.quantile(values, ranks)]


def heap_mib() -> float | None:
    """Memory allocated through the C library, in MiB, without its free memory; None if it does not report it."""

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "us", "fs", "used", "free", "top")
        ]

    try:
        call = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    call.restype = Info
    info = call()
    return float(info.used + info.hblkhd) / 2**20
