"""Cameras, triggers and files of a small line, for tests: frames from a list, parts from a list, a line.toml."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tiny_bundle import gray_frame

from saae_runtime.line.camera import CameraStats, EndOfFrames, NoFrameError, Shot
from saae_runtime.line.part import Choice, Trigger, Verdict, now

SPOT = (10, 20, 9, 14)

SINKS = """
[[sink]]
kind = "jsonl"
path = "out.jsonl"
[[sink]]
kind = "csv"
path = "out.csv"
[[sink]]
kind = "sqlite"
path = "out.sqlite"
"""
"""A sink of each kind that writes a file."""


def good() -> np.ndarray:
    """Scores 0 with the tiny bundle."""
    return gray_frame()


def bad() -> np.ndarray:
    """Scores 127 with the tiny bundle."""
    return gray_frame(spot=SPOT)


def wait_until(check: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether something becomes true; for what other threads do."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class ListCamera:
    """Gives frames of a list, or waits and raises what is in it instead.

    Args:
        items: frames, exceptions to raise, or functions that give one of these when the frame is asked for.
        live: see `Camera`.
        endless: after the last one it gives none, instead of ending.
    """

    def __init__(self, items: Iterable[Any], live: bool = False, endless: bool = False) -> None:
        self.live, self._endless = live, endless
        self._items: Iterator[Any] = iter(items)
        self._closed = threading.Event()
        self.triggers = 0
        self.grabbed = 0

    @property
    def stats(self) -> CameraStats:
        return CameraStats(grabbed=self.grabbed)

    def trigger(self) -> None:
        self.triggers += 1

    def grab(self, timeout: float) -> Shot:
        if self._closed.is_set():
            raise EndOfFrames
        item = next(self._items, None)
        if callable(item):
            item = item()
        if item is None:
            if not self._endless:
                raise EndOfFrames
            self._closed.wait(timeout)
            raise NoFrameError("The list is at its end.")
        if isinstance(item, BaseException):
            raise item
        self.grabbed += 1
        return Shot(item, f"frame-{self.grabbed}.png", now())

    def close(self) -> None:
        self._closed.set()


class ListTrigger:
    """Asks for parts put into it, and notes what it is told about them."""

    def __init__(self, accept: bool = True) -> None:
        self._parts: queue.Queue[Trigger] = queue.Queue()
        self.accept = accept
        self.answers: list[tuple[str, Verdict, float | None]] = []
        self.failures: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self._closed = threading.Event()

    def ask(self, part_id: str, recipe: str | None = None) -> None:
        self._parts.put(Trigger(part_id, recipe))

    def wait(self, timeout: float) -> Trigger | None:
        if self._closed.is_set():
            return None
        try:
            return self._parts.get(timeout=timeout)
        except queue.Empty:
            return None

    def answer(self, part_id: str, verdict: Verdict, score: float | None) -> bool:
        self.answers.append((part_id, verdict, score))
        return self.accept

    def fail(self, part_id: str, reason: str) -> None:
        self.failures.append((part_id, reason))

    def fault(self, reason: str) -> None:
        self.faults.append(reason)

    def recover(self) -> None:
        self.faults.append("")

    def missed(self) -> list[tuple[Trigger, str]]:
        return []

    def choices(self) -> list[Choice]:
        return []

    def close(self) -> None:
        self._closed.set()


def line_text(bundle: Path, camera: str = "frames", more: str = "", station: str = "") -> str:
    """A small line.toml: one station, one recipe; further tables and keys of the station as given."""
    return f"""
[line]
sync_seconds = 0.05

[[station]]
name = "one"
camera = "{camera}"
recipes = ["first"]
{station}

[[recipe]]
name = "first"
bundle = "{bundle}"
threads = 1
{more}
"""
