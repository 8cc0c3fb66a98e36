"""How soon a drift of lamp, focus or camera raises an alarm, on real images of good parts, and how often a false one.

    python benchmarks/drift.py BUNDLE [BUNDLE ...] --images FOLDER [--window 200] [--parts 1000] [--out FILE]

Good parts come in random order, drawn with replacement from FOLDER; from one part on they change a little more with
each: `brightness` falls, `blur` grows, the image is `shift`ed, each from zero to its full size in `--ramp` parts.
The delay is the number of parts from the beginning of the ramp to the alarm, the median over `--runs` orders, and
`seen at` is how far the ramp had come by then. `none` is without any change: how many of the runs raised an alarm
within `--parts` parts.

No image may be one that a bundle was built from, because its table is made of these. Many images are needed: a few that
are repeated have their own share above the marks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from saae_runtime.engine import Engine
from saae_runtime.images import read_image
from saae_runtime.line.config import HealthConfig
from saae_runtime.line.drift import DriftMonitor
from saae_runtime.line.part import Part, Verdict, now
from saae_runtime.sources.folders import images_below

Frame = NDArray[np.uint8]
COLUMNS = ("calibrated_on", "change", "alarms", "delay", "seen_at", "scores_at_its_end")
STEPS = 8  # sizes of a change that are scored; between them, the next lower one is used


def brightness(frame: Frame, size: float) -> Frame:
    """Darker, by 30 % at the end."""
    return np.clip(frame.astype(np.float32) * (1 - 0.3 * size), 0, 255).astype(np.uint8)


def blur(frame: Frame, size: float) -> Frame:
    """Out of focus, by a Gaussian of 3 pixels in 1000 of the longer side at the end."""
    from PIL import Image, ImageFilter

    radius = float(0.003 * size * max(frame.shape[:2]))
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)))


def strong_blur(frame: Frame, size: float) -> Frame:
    """Out of focus, by 1 in 100 at the end."""
    return blur(frame, size / 0.3)


def shift(frame: Frame, size: float) -> Frame:
    """Moved to the side, by a twentieth of the width at the end; the border is repeated."""
    pixels = round(0.05 * size * frame.shape[1])
    if not pixels:
        return frame
    return np.concatenate([np.repeat(frame[:, :1], pixels, axis=1), frame[:, :-pixels]], axis=1)


CHANGES: dict[str, Callable[[Frame, float], Frame]] = {
    "brightness": brightness,
    "blur": blur,
    "strong blur": strong_blur,
    "shift": shift,
}


def first_alarm(monitor: DriftMonitor, scores: NDArray[np.float64], table: Any) -> int | None:
    """Number of the part at which the alarm begins; None without an alarm."""
    for place, score in enumerate(scores):
        part = Part("p", "s", now(), Verdict.OK, "score", recipe="r", bundle="b", score=float(score))
        if monitor.take(part, table):
            return place
    return None


def measured(
    bundle: Path, files: list[Path], most: int, config: HealthConfig, parts: int, ramp: int, runs: int
) -> list[dict[str, Any]]:
    """The rows of one bundle: without a change, then each change."""
    random = np.random.default_rng(0)
    with Engine(bundle, threads=1) as engine:
        table = engine.manifest.thresholds[engine.backend.precision].image
        sizes = np.linspace(0, 1, STEPS + 1)
        frames = [read_image(file, engine.white_level) for file in files]
        plain = np.array([engine(frame).score for frame in frames])
        frames = frames[:most]
        scored = {
            name: np.array([[engine(change(frame, size)).score for frame in frames] for size in sizes])
            for name, change in CHANGES.items()
        }
    false = 0
    for _ in range(runs):
        order = random.integers(plain.size, size=parts)
        false += first_alarm(DriftMonitor(config), plain[order], table) is not None
    rows: list[dict[str, Any]] = [
        {"calibrated_on": table.count, "change": "none", "alarms": f"{false} of {runs}", "delay": None, "seen_at": None}
    ]
    window = config.drift_window
    for name, scores in scored.items():
        delays = []
        for _ in range(runs):
            order = random.integers(len(frames), size=window + 3 * ramp)
            size = np.clip((np.arange(order.size) - window) / ramp, 0, 1)
            found = first_alarm(DriftMonitor(config), scores[(size * STEPS).astype(int), order], table)
            delays.append(np.inf if found is None else found - window)
        median = float(np.median(delays))
        rows.append(
            {
                "calibrated_on": table.count,
                "change": name,
                "alarms": f"{sum(np.isfinite(delays))} of {runs}",
                "delay": None if np.isinf(median) else round(median),
                "seen_at": None if np.isinf(median) else f"{100 * min(max(median / ramp, 0.0), 1.0):.0f} %",
                "scores_at_its_end": f"x {np.median(scores[-1]) / np.median(scores[0]):.2f}",
            }
        )
    return rows


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of bundles.")],
    images: Annotated[Path, typer.Option(help="Images of good parts.")],
    window: Annotated[int, typer.Option(min=20, help="Parts compared together.")] = 200,
    parts: Annotated[int, typer.Option(min=1, help="Without a change.")] = 1000,
    ramp: Annotated[int, typer.Option(min=1, help="Parts from no change to the full one.")] = 1000,
    runs: Annotated[int, typer.Option(min=1, help="Orders of the parts.")] = 50,
    most: Annotated[int, typer.Option(min=2, help="Number of images that are changed.")] = 40,
    out: Annotated[Path | None, typer.Option(help="Result file.")] = None,
) -> None:
    """Measure the delay of the drift alarm, and false ones."""
    files = images_below(images)
    config = HealthConfig(drift_window=window)
    rows = [row for bundle in bundles for row in measured(bundle, files, most, config, parts, ramp, runs)]
    settings = {"window": window, "parts": parts, "ramp": ramp, "runs": runs, "images": len(files), "changed": most}
    data = common.result("drift", rows, settings=settings, inside="nothing is timed; delays are in parts")
    common.print_table(
        f"Drift, windows of {window} parts, ramps of {ramp}",
        ["calibrated on", "change", "alarms", "median delay, parts", "of the ramp", "scores at its end"],
        [[row.get(name) for name in COLUMNS] for row in rows],
        [f"Written to {common.write_result(data, out)}"],
    )


if __name__ == "__main__":
    typer.run(main)
